"""The text that ships with Python, and batches of its bytes."""

import jax
import numpy as np
import pytest

from jaxattn.data import byte_batches, load_text


def _batches(seed=0, *, text="abcdefgh" * 40, batch_size=4, length=16):
  return byte_batches(
    jax.random.key(seed), text, batch_size=batch_size, length=length
  )


def test_text_is_ascii_english_of_the_expected_size():
  text = load_text()
  assert text.isascii()
  assert text == load_text()
  # The documentation grows from one minor version of Python to the next.
  assert 400_000 < len(text) < 700_000
  assert 85 <= len(set(text)) <= 100
  assert text.count(" the ") > 2000


def test_windows_are_cut_from_the_text():
  text = load_text()[:5000]
  batch = _batches(text=text, batch_size=8, length=100)(0)
  assert batch.shape == (8, 101)
  assert batch.dtype == np.int32
  for row in batch:
    assert bytes(row.astype(np.uint8)).decode() in text


def test_every_start_is_reached_and_none_beyond_the_end():
  text = "".join(map(chr, range(20)))
  batch = _batches(text=text, batch_size=2000, length=12)(0)
  starts, counts = np.unique(batch[:, 0], return_counts=True)
  np.testing.assert_array_equal(starts, np.arange(8))
  np.testing.assert_array_equal(
    batch - batch[:, :1], np.broadcast_to(np.arange(13), batch.shape)
  )
  # Binomial(2000, 1/8): mean 250, standard deviation 14.8.
  assert np.all(np.abs(counts - 250) < 5 * 14.8)


def test_a_text_of_one_window_gives_that_window():
  batch = _batches(text="abcd", batch_size=2, length=3)(5)
  np.testing.assert_array_equal(batch, [[97, 98, 99, 100]] * 2)


def test_going_on_from_a_cursor_gives_the_same_batches():
  unbroken = [_batches()(cursor) for cursor in range(6)]
  resumed = _batches()  # As a new process would make it.
  for cursor in (3, 4, 5, 0):
    np.testing.assert_array_equal(resumed(cursor), unbroken[cursor])
  # Other cursors and other keys give other batches.
  for i in range(6):
    for j in range(i):
      assert np.any(unbroken[i] != unbroken[j])
  assert np.any(_batches(1)(0) != unbroken[0])


def test_old_and_new_style_keys_agree():
  old = byte_batches(
    jax.random.PRNGKey(0), "abcdefgh" * 40, batch_size=4, length=16
  )
  np.testing.assert_array_equal(old(2), _batches()(2))


def test_drawing_touches_no_device():
  batch_at = _batches()
  with jax.transfer_guard("disallow"):
    batch_at(1)


def test_bytes_outside_ascii_are_utf8():
  batch = _batches(text="é", batch_size=1, length=1)(0)
  np.testing.assert_array_equal(batch, [[0xC3, 0xA9]])


def test_bad_input_is_refused_by_message():
  with pytest.raises(ValueError, match="batch_size must be >= 1, got 0"):
    _batches(batch_size=0)
  with pytest.raises(ValueError, match="length must be an integer"):
    _batches(length=2.0)
  with pytest.raises(
    ValueError, match=r"at least length \+ 1 = 5 bytes, got 4"
  ):
    _batches(text="abcd", length=4)
  with pytest.raises(ValueError, match="cursor must be >= 0, got -1"):
    _batches()(-1)
  with pytest.raises(ValueError, match="rng must be a PRNG key, got 3"):
    byte_batches(3, "abcd", batch_size=1, length=1)
  with pytest.raises(ValueError, match="key data of rng must have 1 dim"):
    byte_batches(
      jax.random.split(jax.random.key(0)), "abcd", batch_size=1, length=1
    )
