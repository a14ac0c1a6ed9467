"""Writes data.md from core/data/catalog.py: `python docs/datasets.py`."""

from __future__ import annotations

from pathlib import Path

from hetfl.data.catalog import KNOWN, DatasetInfo

PAGE = Path(__file__).with_name("data.md")

COLUMNS = ("name", "where from", "input, label", "shape", "classes", "model", "preprocessing", "natural partition", "")


def line(name: str, known: DatasetInfo) -> str:
    where = f"Hub `{known.hub}`" if known.hub else "embedded" if name in ("digits", "dialects") else f"a folder ({known.layout})"
    shape = "x".join(map(str, known.shape)) or "text"
    cells = [f"`{name}`", where, f"`{known.input}`, `{known.label}`", shape, str(known.classes), f"`{known.model}`"]
    return "| " + " | ".join([*cells, preprocessing(known), f"`{known.owner}`" if known.owner else "-", known.note]) + " |"


def preprocessing(known: DatasetInfo) -> str:
    if known.text:
        return "words hashed to ids" if known.hub else "token ids"
    if not known.mean:
        return "train split's own mean and std of each channel"
    values = [", ".join(f"{v:g}" for v in part) for part in (known.mean, known.std)]
    return f"/ {known.scale:g}, mean {values[0]}, std {values[1]}"


def text() -> str:
    """The page."""
    head = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    return INTRODUCTION + "\n".join([*head, *(line(name, known) for name, known in KNOWN.items())]) + "\n" + REST


INTRODUCTION = """# Data

`--dataset` takes a short name of the table (generated from core/data/catalog.py by `python docs/datasets.py`), a Hub id, a folder
or a file. Short names are looked for in the folder `$HETFL_DATA` before the Hub; a folder that bears a short name is treated as
that data set. The Hub was not in reach when this was written: mnist, cifar10, cifar100, ag_news were read from copies of its
files; fashion-mnist and cinic10 are not tried. Decoded data and partitions are cached in `~/.cache/hetfl` (`$HETFL_CACHE`).

"""

REST = """
`--model` defaults to the table's model; for other data to `encoder` (text; `decoder` under `--task lm`), `fedconv-cnn` (one
channel), `resnet18` (more) or
`mlp` (vectors).

## Preprocessing

Everything that was found is spelt out in the run folder's `config.toml`, and a run of that file does the same again:

- **Columns**: images, arrays of numbers or text; the label is a ClassLabel, or a column of whole numbers or strings named
  label, labels, y or target; other numbers are learned as [other tasks](tasks.md). Where that leaves a
  choice, `--input-column`, `--label-column` and `--id-column` decide.
- **Images and arrays** become float32 of shape (channels, ...): (raw value - mean) / std of each channel, by the table's
  constants or else the train split's own mean and standard deviation; `--mean` and `--std` (of raw values) set them. Arrays of
  two dimensions get one channel, so a window of 100 steps of 6 sensors is (1, 100, 6); `cnn1d` and `lstm` read its rows as time.
- **Text** is lower-cased and split into words and marks, each hashed (CRC-32) to an id in [2, `--vocab`); 1 starts every text, 0
  pads it to `--tokens`; or a [tokenizer](tasks.md#models-from-a-folder-or-from-the-hugging-face-hub) does it.
  Nothing is downloaded and nothing learned from clients; two words may share an id.
- **Augmentation**, of the clients' own pictures while they train: `--augment crop` moves a picture by up to `--crop-padding` pixels
  (4), black where nothing is left; `flip` mirrors every other one; `usual` is `crop,flip` for cifar10, cifar100 and cinic10 and
  nothing for the rest. Draws come from each client's stream, so that neither workers nor vmap groups change them. What the server
  trains on, what is tested, and the methods that train on something of their own (public data) stay as they are.

## Folders

Parquet files (Hugging Face features are read), named by split: `train*.parquet`, `test*.parquet`. Without a test split a
class-stratified fifth of the train split is set apart; a validation split serves as test where there is no other.

A parquet or CSV file with a column for each feature is read as vectors of all its columns of single numbers but the label's and
owner's; a CSV file with one column of text as text. `--label-column` names a label that has no usual name.

A folder with a folder of pictures for each class (`cat/1.png`, or `train/cat/1.png` and `test/cat/2.png`; png, jpg, bmp, webp) is
read too; the pictures must be of one size: `PIL.Image.open(file).resize((64, 64)).save(file)` makes them so.

npz files, for data that cannot be downloaded by anyone (`dcd`, `harbox`, `wiar`, or your own): `train.npz` and `test.npz` with

| array | shape | what |
|---|---|---|
| `x` | (N, ...) | inputs: uint8 or any number; (N, F) are vectors, (N, H, W) gets one channel, (N, C, H, W) has channels first |
| `y` | (N,) | class labels, whole numbers or strings |
| `user` | (N,) | optional: who owns the example, for `--partition natural` |
| `classes` | (classes,) | optional: names of the labels in sorted order |

Shapes of the papers: dcd (N, 36, 36), harbox (N, 30, 30), wiar (N, 90, 250). These three are tested on made arrays
only; nobody here has seen the originals.

## Partitions

| `--partition` | who holds what |
|---|---|
| `iid` | equal random parts |
| `dirichlet` | class shares of each client drawn with concentration `--alpha` |
| `pathological` | `--classes-per-client` classes each |
| `shard` | `--classes-per-client` shards of sorted labels each (HeteroFL, McMahan et al.) |
| `quantity` | IID labels, sizes drawn with concentration `--alpha`, at least 2 examples each |
| `natural` | the values of `--id-column`: people, devices, places |

flwr-datasets deals them out. The server's public examples (`--server-data`) are set apart before, class-stratified; each client
keeps `--own-test` of its examples for its own test.
"""

if __name__ == "__main__":
    PAGE.write_text(text())
