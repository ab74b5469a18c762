"""Why the kernels' blocks are what they are, from the words that they move."""

import textwrap

from jaxattn.iocomplexity import block_sizes, io_count
from pallas_kernels.flash_attention import config as flash

_LENGTH, _DIM = 16384, 128
# Products in 16 bits over bytes from memory, as the makers state them.
BALANCE = {
  "v5e": 197e12 / 819e9,
  "v6e": 918e12 / 1640e9,
  "H100": 989e12 / 3350e9,
}
# What holds blocks, in words of 4 bytes: a number of 32 bits, or one of 16 bits
# twice, since a block comes while another one is worked on.
VMEM_WORDS = 16 * 2**20 // 4
SHARED_WORDS = 227 * 2**10 // 4
# On a TPU a tile of sums, twice the tile that it becomes, and as much again for
# tiles that come.
SMALL_CACHE_WORDS = VMEM_WORDS // 4


def flops_a_byte(kind: str, block_q: int, block_k: int) -> float:
  """Products over bytes moved, in 16 bits, of one head."""
  sizes = {"num_queries": _LENGTH, "num_keys": _LENGTH, "head_dim": _DIM}
  algorithm, block, flops = {
    "forward": ("fwd_large", block_q, 4),
    "backward": ("bwd_two_pass", (block_k, block_q), 14),
  }[kind]
  count = io_count(algorithm, cache_words=2**40, block_size=block, **sizes)
  return flops * _LENGTH**2 * _DIM / (2 * count.total)


def powers_of_two(*sizes: int) -> tuple[int, ...]:
  """The largest ones that are no larger."""
  return tuple(1 << (size.bit_length() - 1) for size in sizes)


def small_cache_block(words: int) -> int:
  """The tile that a cache of so many words holds."""
  count = io_count(
    "fwd_small", num_queries=_LENGTH, num_keys=_LENGTH, head_dim=1024,
    cache_words=words,
  )  # fmt: skip
  return int(count.blocks[0])


def section() -> str:
  """What the formulas say of the default block sizes."""
  tpu = block_sizes(VMEM_WORDS, _DIM, kind="tpu")
  gpu = block_sizes(SHARED_WORDS, _DIM, kind="gpu")
  small_block = small_cache_block(SMALL_CACHE_WORDS)
  tiles = sorted({(64, 64), (256, 256), (512, 512), (1024, 1024), (2048, 2048)})
  defaults = {_pair(flash.TPU), _pair(flash.GPU)}
  balance = ", ".join(f"{x:.0f} ({name})" for name, x in BALANCE.items())
  text = _WHY.format(
    vmem=VMEM_WORDS,
    tpu=tpu,
    tpu_powers=powers_of_two(tpu.block_q_bwd, tpu.block_k_bwd),
    shared=SHARED_WORDS,
    gpu=gpu,
    small_words=SMALL_CACHE_WORDS,
    small_block=small_block,
    small_power=powers_of_two(small_block)[0],
    length=_LENGTH,
    dim=_DIM,
    balance=balance,
  )
  lines = [
    *map(_filled, text.split("\n\n")),
    "| blocks | forward | backward |\n|---|---|---|",
  ]
  rows = []
  for q, k in tiles:
    name = f"**{q} x {k}**" if (q, k) in defaults else f"{q} x {k}"
    forward, backward = (
      flops_a_byte(kind, q, k) for kind in ("forward", "backward")
    )
    rows.append(f"\n| {name} | {forward:.0f} | {backward:.0f} |")
  return "\n\n".join(lines) + "".join(rows) + "\n"


def _filled(paragraph: str) -> str:
  indent = "  " if paragraph.startswith("* ") else ""
  words = " ".join(paragraph.split())
  return textwrap.fill(words, 80, subsequent_indent=indent)


def _pair(sizes: flash.BlockSizes) -> tuple[int, int]:
  return sizes.block_q, sizes.block_k


_WHY = """## Why these blocks

`jaxattn.iocomplexity.block_sizes` has the blocks that move the fewest words. A
word is 4 bytes: a number of 32 bits, or one of 16 bits twice, since a block
comes while the one before it is worked on.

* **TPU, backward.** {vmem} words, 16 MiB of VMEM, and heads of {dim} give
{tpu.block_q_bwd} queries and {tpu.block_k_bwd} keys; as powers of two,
{tpu_powers[0]} and {tpu_powers[1]}.

* **TPU, forward.** They give {tpu.block_q} queries and {tpu.block_k} keys. But
fewer words gain nothing once copies are hidden behind products: the default is
the smallest power of two at which they are, on both kinds. The words do not
depend on the keys of a block; bundles for a score do.

* **GPU.** {shared} words, 227 KiB of shared memory, give {gpu.block_q_bwd}
queries and {gpu.block_k_bwd} keys backward, {gpu.block_q} and {gpu.block_k}
forward. Sums and scores lie in the registers of one warp group, though, which
are fewer: the table above has the blocks at which they spill. Blocks as small
as these do not hide copies from memory: that is left to the cache between.

* **Small caches.** A tile is there four times: sums, twice what they become,
and tiles that come. The {small_words} words that this leaves of VMEM give
{small_block} rows and columns; as a power of two, {small_power}.

* **ReLU attention** moves what exact attention moves, and a few numbers for
each query more: it takes its blocks. So does NTK-Attention, which also moves
the features of a query once, and the state once for each block of queries.

* **Tensor attention.** A tile is one of exact attention, to keys that are
paired where they are. Bundles for a score fall with either side, and what
leaves registers grows; gradients of queries and of first keys stay in VMEM
besides.

* **Polynomial attention** moves each operand once a pass, whatever the chunk.
On a TPU chunks of 512 need 1 % fewer bundles than the default and twice its
memory, which more features need. On a GPU each chunk has a state in memory:
with as many tokens as features, states take no more room than what tokens
carry.

Floating-point operations for each byte moved, {length} queries and keys of 16
bits. Copies are hidden from so many on: {balance}."""
