"""FedConv (Shen et al., MobiSys 2024): learned compression and dilation of submodels.

To be read in this order: `tiling` (tensors as images), `filters`, `compression`, `dilation`, `tuning` (how both are trained), and
`strategy` (the plugin, with its `options`). `fast` computes compression faster, and changes nothing else.
"""
