"""A canary: which private name this version of torch lacks. The package then takes the public, slower way."""

import platform

import pytest
import torch

from amtss_fast._compat import torch as private

X86 = platform.machine() in ("x86_64", "AMD64")


@pytest.mark.parametrize("path", [*private.PRIVATE, *(private.ONEDNN if X86 else ())])
def test_private_names_exist(path: str) -> None:
    assert private.find(path) is not None, f"torch {torch.__version__} has no torch.{path}"


def test_what_does_not_exist() -> None:
    assert private.find("ops.onednn.no_such_operator") is None
    assert private.find("_C.no_such_module.function") is None


@pytest.mark.skipif(not private.has_onednn_int8(), reason="this build of torch lacks oneDNN's 8-bit products")
def test_onednn_computes_the_product_of_the_codes() -> None:
    generator = torch.Generator().manual_seed(0)
    # Small enough for CPUs that add pairs of products in 16 bits.
    codes = torch.randint(0, 256, (5, 40), dtype=torch.uint8, generator=generator)
    weight = torch.randint(-63, 64, (16, 40), dtype=torch.int8, generator=generator)
    scale = torch.rand(16, generator=generator)
    y = private.onednn_linear(codes, 128, private.pack_onednn(weight), scale, torch.zeros(16, dtype=torch.int64))
    expected = (codes.double() - 128) @ weight.double().T * scale.double()
    torch.testing.assert_close(y, expected.float(), rtol=1e-6, atol=0)


def test_a_wrapper_has_inner_tensors() -> None:
    class Wrapper(torch.Tensor):
        def __tensor_flatten__(self) -> tuple[list[str], None]:
            return ["codes", "scale"], None

    wrapper = torch.zeros(2).as_subclass(Wrapper)
    wrapper.codes, wrapper.scale = torch.ones(3), torch.ones(1)
    assert [len(inner) for inner in private.inner_tensors(wrapper)] == [3, 1]
    assert private.inner_tensors(torch.zeros(2)) == []
