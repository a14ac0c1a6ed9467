"""Tables of torch operations by what they do with channels; an op in none of them, and without a rule, freezes what it touches."""

from __future__ import annotations

# only move data: they run on the ids themselves
MOVES = frozenset(
    (
        "view reshape permute transpose flatten unflatten squeeze unsqueeze expand repeat tile chunk split unbind "
        "__getitem__ cat concat concatenate stack narrow select index_select t T mT H swapaxes swapdims movedim moveaxis "
        "flip roll tensor_split repeat_interleave ravel pixel_shuffle pixel_unshuffle channel_shuffle adjoint view_as "
        "reshape_as expand_as broadcast_to hsplit vsplit dsplit hstack vstack"
    ).split()
)

# elementwise: the result has the channels of its operands, which are tied
SAME = frozenset(
    (
        "add sub subtract rsub mul multiply div divide true_divide maximum minimum pow where addcmul addcdiv lerp add_ "
        "__add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ __mul__ __rmul__ __imul__ __truediv__ __rtruediv__ "
        "__itruediv__ __pow__ __rpow__ __neg__ relu relu6 gelu silu mish sigmoid tanh leaky_relu elu selu celu softplus "
        "softsign hardswish hardsigmoid hardtanh logsigmoid threshold softshrink hardshrink tanhshrink rrelu clamp "
        "clamp_min clamp_max clip abs neg exp log log1p expm1 sqrt rsqrt square reciprocal sin cos erf sign nan_to_num "
        "masked_fill dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout contiguous "
        "clone detach to float double half bfloat16 type type_as cpu cuda requires_grad_ data alias positive eq ne lt le "
        "gt ge isnan logical_not zeros_like ones_like rand_like randn_like empty_like bernoulli pin_memory to_dense atan log2 "
        "fill __and__ __or__ __invert__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__ logical_and logical_or full_like"
    ).split()
)

# over some dims; over channels they are over those that remain
REDUCE = frozenset(
    (
        "mean sum amax amin max min std var norm logsumexp prod all any std_mean var_mean median softmax log_softmax softmin "
        "gumbel_softmax cumsum cumprod cummax cummin logcumsumexp sort argsort linalg_norm linalg_vector_norm"
    ).split()
)

# of these, what depends on the order of the channels
ORDERED = frozenset("cumsum cumprod cummax cummin logcumsumexp sort argsort median".split())

# reductions whose result has the shape of their input
SOFT = frozenset("softmax log_softmax softmin gumbel_softmax cumsum cumprod cummax cummin logcumsumexp sort argsort".split())

CASTS = frozenset("to type_as".split())  # elementwise, with a second operand of which only the type counts

SHAPED = frozenset("reshape view unflatten split expand broadcast_to".split())  # ops that are given sizes of what they make

VALUES = frozenset("__bool__ __int__ __float__ __index__ item tolist".split())  # Python may branch on what these give

# new tensors made from one that they take nothing of but its type
NEW = frozenset("new_zeros new_ones new_full new_empty new_tensor".split())

# new tensors whose sizes may be numbers of channels
MADE = frozenset("zeros ones empty full rand randn new_zeros new_ones new_full new_empty".split())

NUMBERS = frozenset("tensor as_tensor scalar_tensor".split())  # new tensors of numbers that they are given

# on (N, channels, …): they change the dims after the channels
SPATIAL = frozenset(
    (
        "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
        "adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d lp_pool1d lp_pool2d interpolate "
        "upsample boolean_dispatch _max_pool1d _max_pool2d _max_pool3d _adaptive_max_pool2d grid_sample max_unpool1d "
        "max_unpool2d max_unpool3d"
    ).split()
)

# draw random numbers
DRAWS = frozenset(
    (
        "dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout rrelu rand_like "
        "randn_like bernoulli rand randn randint randperm normal multinomial poisson uniform"
    ).split()
)
