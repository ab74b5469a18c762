"""The dispatcher: None never fails, a name runs or says why it cannot."""

import functools
import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxattn._dispatch import Branch, dispatch

pytestmark = pytest.mark.any_x64


def _branches(**kernel):
  return {
    "xla": Branch(jnp.sin),
    "kernel": Branch(jnp.tanh, **kernel),
    "interpret": Branch(jnp.cos),
  }


def _operations(branches, platform, implementation=None):
  """Which of the branches are in the program for a platform."""
  lowered = (
    jax.jit(lambda x: dispatch(implementation, branches, x))
    .trace(jax.ShapeDtypeStruct((3,), jnp.float32))
    .lower(lowering_platforms=(platform,))
  )
  text = lowered.as_text()
  names = {"sine": "xla", "tanh": "kernel", "cosine": "interpret"}
  return {name for op, name in names.items() if f"stablehlo.{op}" in text}


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_none_takes_the_branch_of_the_platform_lowered_for(platform):
  want = "kernel" if platform == "tpu" else "xla"
  assert _operations(_branches(platform="tpu"), platform) == {want}


def test_none_passes_over_what_is_unsupported():
  branches = _branches(platform="tpu", unsupported="head_dim is odd")
  assert _operations(branches, "tpu") == {"xla"}


def test_none_without_kernels_is_xla():
  assert _operations(_branches(), "tpu") == {"xla"}


@pytest.mark.parametrize("implementation", ["xla", "kernel", "interpret"])
def test_name_is_taken_whatever_the_platform(implementation):
  branches = _branches(platform="tpu")
  for platform in ("cpu", "tpu"):
    taken = _operations(branches, platform, implementation)
    assert taken == {implementation}


def test_name_that_cannot_run_says_why():
  branches = _branches(platform="tpu", unsupported="head_dim is odd")
  with pytest.raises(
    NotImplementedError,
    match=r"^implementation='kernel' cannot run here: head_dim is odd$",
  ):
    dispatch("kernel", branches, jnp.ones(3))


def _by_platform(**unsupported):
  kernels = tuple(
    Branch(fn, platform, unsupported.get(platform))
    for platform, fn in (("tpu", jnp.tanh), ("cuda", jnp.cos))
  )
  return {"xla": Branch(jnp.sin), "kernels": kernels}


def test_one_name_is_another_kernel_on_each_platform():
  branches = _by_platform()
  assert _operations(branches, "tpu", "kernels") == {"kernel"}
  assert _operations(branches, "cuda", "kernels") == {"interpret"}
  # Nobody asked for a GPU here, so there may be none that runs the kernel.
  assert _operations(branches, "tpu") == {"kernel"}
  assert _operations(branches, "cuda") == {"xla"}


@pytest.mark.parametrize("wrap", [jax.jit, jax.vmap, lambda fn: fn])
def test_name_without_kernel_for_the_platform_says_why(wrap):
  fn = wrap(lambda x: dispatch("kernels", _by_platform(), x))
  with pytest.raises(
    NotImplementedError,
    match=r"implementation='kernels' cannot run here: it needs a TPU or an "
    r"NVIDIA GPU; 'xla' and 'pallas_interpret' run everywhere",
  ):
    fn(jnp.ones(3))


def test_name_that_one_platform_cannot_run_says_why_there():
  branches = _by_platform(tpu="head_dim is odd")
  assert _operations(branches, "cuda", "kernels") == {"interpret"}
  with pytest.raises(NotImplementedError, match="head_dim is odd"):
    _operations(branches, "tpu", "kernels")
  branches = _by_platform(tpu="head_dim is odd", cuda="head_dim is even")
  with pytest.raises(NotImplementedError, match="is odd; head_dim is even"):
    jax.eval_shape(lambda x: dispatch("kernels", branches, x), jnp.ones(3))
  branches = _by_platform(tpu="it is odd", cuda="it is odd")
  with pytest.raises(NotImplementedError, match=r"run here: it is odd(?!;)"):
    jax.eval_shape(lambda x: dispatch("kernels", branches, x), jnp.ones(3))


@pytest.mark.parametrize(
  ("capability", "runs"),
  [("7.5", False), ("9.0", True), ("10.0", False), ("gfx90a", False)],
)
def test_kernels_for_gpus_are_for_compute_capability_9(
  monkeypatch, capability, runs
):
  device = types.SimpleNamespace(platform="gpu", compute_capability=capability)
  monkeypatch.setattr(jax, "local_devices", lambda: [device])
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  kernel = Branch(jnp.tanh, platform="cuda")
  branches = {"xla": Branch(jnp.sin), "kernels": (kernel,)}
  taken = _operations(branches, "cuda")
  assert taken == ({"kernel"} if runs else {"xla"})
  if runs:
    assert _operations(branches, "cuda", "kernels") == {"kernel"}
  else:
    with pytest.raises(
      NotImplementedError,
      match=rf"here: it needs a GPU of compute capability 9, got {capability}",
    ):
      _operations(branches, "cuda", "kernels")


def test_kernels_are_not_sharded_by_the_compiler():
  mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
  sharding = NamedSharding(mesh, P("x"))
  x = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=sharding)
  kernel = Branch(jnp.tanh, platform="tpu")
  branches = {"xla": Branch(jnp.sin), "kernels": (kernel,)}

  def program(implementation, wrap):
    run = functools.partial(dispatch, implementation, branches)
    traced = jax.jit(wrap(run)).trace(x)
    return traced.lower(lowering_platforms=("tpu",)).as_text()

  mapped = functools.partial(
    jax.shard_map, mesh=mesh, in_specs=P("x"), out_specs=P("x")
  )
  assert "stablehlo.sine" in program(None, lambda run: run)
  assert "stablehlo.tanh" in program(None, mapped)
  assert "stablehlo.tanh" in program("kernels", mapped)
  with pytest.raises(
    NotImplementedError, match=r"here: .* needs jax.shard_map"
  ):
    program("kernels", lambda run: run)


def test_unknown_name_lists_the_known_ones():
  with pytest.raises(
    ValueError,
    match=r"^implementation must be one of None, 'xla', 'kernel', "
    r"'interpret', got 'fast'$",
  ):
    dispatch("fast", _branches(), jnp.ones(3))


def test_operands_are_pytrees_and_results_too():
  def swap(x, pair):
    return {"sum": x + pair[0], "rest": pair[1]}

  branches = {"xla": Branch(swap), "kernel": Branch(swap, platform="tpu")}
  for name in (None, "xla", "kernel"):
    result = dispatch(name, branches, jnp.ones(2), (jnp.ones(2), None))
    assert result["rest"] is None
    assert jnp.array_equal(result["sum"], jnp.full(2, 2.0))


def test_gradients_pass_through():
  branches = _branches(platform="tpu")
  for name, want in ((None, jnp.cos), ("interpret", lambda x: -jnp.sin(x))):
    slope = jax.grad(lambda x, name=name: dispatch(name, branches, x))(0.3)
    assert jnp.allclose(slope, want(0.3))
