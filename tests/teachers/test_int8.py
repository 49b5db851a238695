"""8-bit teachers: exact products of codes, fidelity, memory, loading, and compilation."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_teacher
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from amtss_fast._compat import transformers as compat
from amtss_fast.teachers import Teacher, int8, load_teacher
from amtss_fast.teachers.int8 import attention, engines, kernels
from amtss_fast.teachers.int8.layers import LAYERS


def engine(name: str) -> Any:
    missing = int8.why_missing(name)
    return pytest.param(name, marks=pytest.mark.skipif(missing is not None, reason=str(missing)))


ON_CPU = [engine("native"), engine("onednn")]
native = pytest.mark.skipif(int8.why_missing("native") is not None, reason=str(int8.why_missing("native")))
loads = pytest.mark.skipif(compat.why_no_int8_loading() is not None, reason=str(compat.why_no_int8_loading()))


def packed(name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> int8.Int8Linear:
    kind = LAYERS[name]
    layer = kind(weight.shape[1], weight.shape[0], bias is not None)
    layer.weight, layer.scale = (nn.Parameter(values, requires_grad=False) for values in kind.quantize(weight))
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    layer.pack()
    return layer


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("shape", [(1, 16, 3), (7, 768, 64), (64, 130, 770), (300, 1024, 32), (13, 67, 17)])
def test_the_product_is_that_of_the_codes(name: str, shape: tuple[int, int, int], extreme: bool) -> None:
    n, width, outputs = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, width, generator=generator) * torch.logspace(-6, 6, n).unsqueeze(1)
    weight = torch.randn(outputs, width, generator=generator)
    if extreme:
        # All codes at their ends, where sums of pairs in 16 bits would be cut off.
        x, weight = x.sign() * x.abs().amax(1, keepdim=True), weight.sign()
        x[::2], weight[::2] = x[::2].abs(), 1.0
    x[n // 2] = 0
    bias = torch.randn(outputs, generator=generator)
    # The same codes in float64.
    scale = weight.abs().amax(1) / LAYERS[name].largest_code()
    if name == "native":
        least, largest = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
        step = (largest / 255 - least / 255).clamp(min=1e-30)
        top = 255 + (least * step.reciprocal()).round()
        codes = (x * step.reciprocal()).round().minimum(top).double()
    else:
        step = (x.abs().amax(1, keepdim=True) / 127).clamp(min=1e-30)
        codes = (x * step.reciprocal()).round().double()
    product = (codes * step) @ ((weight / scale[:, None]).round().double() * scale[:, None]).T
    for b in (None, bias):
        expected = product if b is None else product + b
        size = (codes * step).abs().sum(1, keepdim=True) * weight.abs().amax()
        error = (packed(name, weight, b)(x[None])[0] - expected).abs()
        assert bool((error <= 1e-6 * (size + 1)).all())


@native
def test_gelu_at_the_end_of_a_product() -> None:
    generator = torch.Generator().manual_seed(0)
    # Outputs from -12 to 12, and far beyond.
    x = torch.linspace(-12, 12, 4001).unsqueeze(1) * torch.ones(2)
    x[0], x[-1] = -1e30, 1e30
    layer = packed("native", torch.eye(2), torch.zeros(2))
    y = layer(x).double()
    layer.gelu = True
    exact = y * torch.erfc(-y / 2**0.5) / 2
    assert bool(((layer(x) - exact).abs() <= 1e-7 + 2e-7 * exact.abs()).all())
    # Relative to what is left of large negative values.
    error = ((layer(x) - exact) / exact)[(y < -1) & (y > -12)]
    assert float(error.abs().max()) < 2e-5
    wide = packed("native", torch.randn(45, 20, generator=generator), None)
    rows = torch.randn(30, 20, generator=generator)
    y = wide(rows)
    wide.gelu = True
    torch.testing.assert_close(wide(rows), torch.nn.functional.gelu(y), rtol=1e-6, atol=1e-6)


@native
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_shows(bad: float) -> None:
    x = torch.randn(20, 40, generator=torch.Generator().manual_seed(0))
    layer = packed("native", torch.randn(33, 40), None)
    good = layer(x)
    x[7, 39] = bad
    for layer.gelu in (False, True):
        y = layer(x)
        assert not y[7].isfinite().any()
        assert bool(y[torch.arange(20) != 7].isfinite().all())
    layer.gelu = False
    others = torch.arange(20) != 7
    assert torch.equal(layer(x)[others], good[others])


def attend_exactly(q: Any, k: Any, v: Any, mask: Any, scale: float) -> torch.Tensor:
    scores = scale * q.double() @ k.double().transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1).nan_to_num() @ v.double()).transpose(1, 2)


@native
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 32), (2, 3, 5, 17, 32), (3, 2, 40, 40, 64), (1, 2, 13, 300, 96)])
@pytest.mark.parametrize("masked", ["", "keys", "pairs"])
def test_attention(shape: tuple[int, ...], masked: str) -> None:
    n, heads, queries, keys, width = shape
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, rows, heads, width, generator=generator) for rows in (queries, keys, keys))
    # Scores far apart, with the scale below.
    q *= 4
    mask = None
    if masked:
        mask = torch.rand(n, 1, queries if masked == "pairs" else 1, keys, generator=generator) < 0.6
        # Nothing to attend to.
        mask[0, 0, 0] = False
    arguments = [t.transpose(1, 2) for t in (q, k, v)]
    out = kernels.attention(*arguments, mask, 0.3)
    exact = attend_exactly(*arguments, mask, 0.3)
    assert float((out - exact).abs().max()) < 2e-6 * 16 * (1 + float(exact.abs().max()))
    # A row's bits do not depend on the batch, on keys that are masked, nor on threads.
    if masked == "keys":
        more = [F.pad(t, (0, 0, 0, 9)) for t in arguments[1:]]
        longer = kernels.attention(arguments[0], *more, F.pad(mask, (0, 9)), 0.3)
        assert torch.equal(longer, out)
    assert torch.equal(kernels.attention(*(t[:1] for t in arguments), mask, 0.3) if mask is None else out[:1], out[:1])


@native
def test_other_attention_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that the kernel does not compute goes to torch."""
    calls: list[str] = []
    original = kernels.attention
    monkeypatch.setattr(kernels, "attention", lambda *a: (calls.append("native"), original(*a))[1])
    module = nn.Module()
    module.is_causal = False
    q, k, v = (torch.randn(2, 3, 9, 32) for _ in range(3))

    def ask(*tensors: torch.Tensor, mask: torch.Tensor | None = None, **options: Any) -> bool:
        calls.clear()
        out, _ = attention.attention(module, *tensors, mask, **options)
        if mask is not None and mask.dtype != torch.bool:
            bias = mask
        else:
            bias = torch.zeros(()) if mask is None else torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
        if options.get("is_causal"):
            bias = torch.full((9, 9), float("-inf")).triu(1)
        scores = tensors[0] @ tensors[1].transpose(-1, -2) * options.get("scaling", tensors[0].shape[-1] ** -0.5)
        expected = ((scores + bias).softmax(-1) @ tensors[2]).transpose(1, 2)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        return bool(calls)

    assert ask(q, k, v)
    assert ask(q, k, v, scaling=0.5)
    assert ask(q, k, v, mask=torch.ones(9, 9, dtype=torch.bool).tril())
    assert not ask(q, k, v, is_causal=True)
    assert not ask(q, k, v, mask=torch.randn(2, 1, 9, 9))
    assert not ask(*(t[..., :16] for t in (q, k, v)))
    assert not ask(q.requires_grad_(), k, v)


@pytest.mark.parametrize("engine", [*ON_CPU, engine("bitsandbytes"), engine("torchao")])
def test_an_8_bit_teacher(tmp_path: Path, engine: str) -> None:
    folder = tiny_teacher(tmp_path, hidden_size=256, intermediate_size=1024, initializer_range=0.05)
    options: dict[str, Any] = {"languages": ["en"], "prior": 2.0}
    exact = load_teacher(folder, **options)
    teacher = load_teacher(folder, precision="int8", engine=engine, **options)
    ids = torch.randint(5, 290, (32, 24), generator=torch.Generator().manual_seed(1))
    p, q = (t.logits(input_ids=ids, attention_mask=torch.ones_like(ids)) for t in (exact, teacher))
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    assert 0 < kl < 1e-4
    assert teacher.memory_footprint() < 0.35 * exact.memory_footprint()
    assert teacher.precision == f"int8 ({engine})"
    assert f"int8 ({engine})" in repr(teacher)
    assert isinstance(teacher.model.classifier, nn.Linear)
    assert type(teacher.model.bert.pooler.dense) is nn.Linear
    assert teacher.dtype == torch.float32
    assert not any(weight.requires_grad for weight in teacher.model.parameters())
    if engine == "native":
        # Heads of 128, and the GELU of both layers.
        assert teacher.model.config._attn_implementation == "amtss_fast"
        assert [type(m).__name__ for m in teacher.model.modules()].count("GELUActivation") == 0


def test_rows_of_like_length_go_together(tmp_path: Path) -> None:
    teacher = load_teacher(tiny_teacher(tmp_path))
    lengths = torch.tensor([40, 9, 40, 8] * 4 + [7, 30, 22, 21, 41])
    ids = torch.randint(5, 290, (21, 41), generator=torch.Generator().manual_seed(0))
    for left in (False, True):
        place = torch.arange(41).flip(0) if left else torch.arange(41)
        mask = (place < lengths.unsqueeze(1)).long()
        seen: list[tuple[int, ...]] = []
        hook = teacher.model.register_forward_pre_hook(
            lambda model, args, kwargs, seen=seen: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        )
        together = teacher.logits(input_ids=ids * mask, attention_mask=mask)
        hook.remove()
        # Nine rows of 40 and 41 tokens, then twelve of 7 to 30, each padded to a multiple of 8 or 16.
        assert seen == [(9, 48), (12, 32)]
        # The same rows as the model knows them: positions count from the first token.
        rows = [row[use.bool()] for row, use in zip(ids, mask, strict=True)]
        with torch.no_grad():
            expected = torch.cat([teacher.model(input_ids=row.unsqueeze(0)).logits for row in rows])
        torch.testing.assert_close(together, expected, rtol=1e-5, atol=1e-5)


@native
def test_fast_teachers_are_cut_where_it_pays(tmp_path: Path) -> None:
    teacher = load_teacher(tiny_teacher(tmp_path, hidden_size=64), precision="int8", engine="native")
    seen: list[tuple[int, ...]] = []
    teacher.model.register_forward_pre_hook(
        lambda model, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    for long, short, expected in [(20, 10, [(16, 20)]), (40, 24, [(8, 40), (8, 24)])]:
        seen.clear()
        mask = (torch.arange(long) < torch.tensor([long] * 8 + [short] * 8).unsqueeze(1)).long()
        teacher.logits(input_ids=mask * 7, attention_mask=mask)
        assert seen == expected


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("engine", [None, *ON_CPU])
def test_the_bits_of_a_row_do_not_depend_on_its_batch(tmp_path: Path, engine: str | None) -> None:
    folder = tiny_teacher(tmp_path, hidden_size=64, intermediate_size=256)
    teacher = load_teacher(folder, precision="int8" if engine else "float32", engine=engine)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 290, (33, 48), generator=generator)
    mask = (torch.arange(48) < torch.randint(3, 40, (33, 1), generator=generator)).long()
    ids = ids * mask
    everything = teacher.logits(input_ids=ids, attention_mask=mask)
    for rows in (slice(0, 1), slice(4, 6), slice(3, 20), slice(0, 32)):
        width = int(mask[rows].sum(1).max())
        alone = teacher.logits(input_ids=ids[rows, :width], attention_mask=mask[rows, :width])
        assert torch.equal(alone, everything[rows])


@loads
def test_loading_holds_one_float_weight_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_teacher(tmp_path, num_hidden_layers=3)
    seen: list[weakref.ref] = []
    most = 0

    def convert(self: Any, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, torch.Tensor]:
        nonlocal most
        for value in input_dict.values():
            seen.append(weakref.ref(value[0] if isinstance(value, list) else value))
        most = max(most, sum(ref() is not None for ref in seen))
        return original(self, input_dict, **kwargs)

    from amtss_fast._compat.loading import _Replace

    original = _Replace.convert
    monkeypatch.setattr(_Replace, "convert", convert)
    load_teacher(folder, precision="int8")
    assert len(seen) == 18
    # The one at hand, and one that the loop may not have let go yet.
    assert most <= 2


@loads
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_the_float_weights_are_not_kept(tmp_path: Path) -> None:
    folder = tiny_teacher(tmp_path)
    exact = load_teacher(folder)
    assert str(folder) in Path("/proc/self/maps").read_text()
    del exact
    gc.collect()
    teacher = load_teacher(folder, precision="int8")
    assert str(folder) not in Path("/proc/self/maps").read_text(), teacher


@pytest.mark.parametrize("engine", ON_CPU)
def test_one_compilation_serves_all_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    teacher = load_teacher(
        tiny_teacher(tmp_path, num_hidden_layers=1, hidden_size=64), precision="int8", engine=engine, compile=True
    )
    eager = Teacher(teacher.model, name="eager", tokenizer=teacher.tokenizer)
    for rows, length in [(9, 13), (1, 5), (33, 40), (2, 62), (16, 64), (8, 8)]:
        ids = torch.randint(5, 290, (rows, length))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        torch.testing.assert_close(teacher.logits(**inputs), eager.logits(**inputs), rtol=0, atol=1e-6)
    assert counter.frame_count == 1


def test_an_older_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, and before anything is read: some versions would load wrong weights in silence."""
    monkeypatch.setattr("transformers.__version__", "5.22.2")
    for engine in (None, *int8.ENGINES):
        with pytest.raises(ImportError, match=r"8-bit loading needs transformers>=5\.23, installed is 5\.22\.2"):
            load_teacher("nowhere", precision="int8", engine=engine)
    monkeypatch.setattr("transformers.__version__", "5.23.0.dev0")
    assert compat.why_no_int8_loading() is None


@loads
def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_teacher(tmp_path)
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    for engine in ("bitsandbytes", "torchao"):
        with pytest.raises(ImportError, match=f"engine '{engine}': it is not installed: pip install {engine}"):
            load_teacher(folder, precision="int8", engine=engine)
    with pytest.raises(ImportError, match="pip install bitsandbytes"):
        int8.choose_engine(None, torch.device("cuda"))
    for engine in ("native", "onednn"):
        with pytest.raises(ValueError, match=f"engine '{engine}' runs on the CPU, not on cuda"):
            int8.choose_engine(engine, torch.device("cuda"))
    monkeypatch.setattr(kernels, "has_int8", lambda: False)
    assert int8.choose_engine(None, torch.device("cpu")) == "onednn"
    with pytest.raises(ImportError, match="engine 'native': it needs a CPU with AVX-512 VNNI"):
        load_teacher(folder, precision="int8", engine="native")
    monkeypatch.setattr(engines.platform, "machine", lambda: "aarch64")
    with pytest.raises(ImportError, match="engine 'onednn': it runs on x86-64 CPUs, this is aarch64"):
        load_teacher(folder, precision="int8")
