from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderDC
from torch import nn
from torch.nn import functional
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from benchmarks import gpu
from benchmarks.gpu import Bench, Measured, Row
from dim.errors import ConfigError
from dim.model.painter import Painter

ROOT = Path(__file__).resolve().parents[2]
WITHOUT = ("ray", "training", "pipelines", "serving", "workflows", "infra", "mlflow")
RUN = f"import sys; sys.modules |= dict.fromkeys({WITHOUT}); from benchmarks import gpu; "


def bench(batch: int = 2) -> Bench:
    return Bench(gpu.make_size("tiny"), torch.device("cpu"), batch, repeats=1, seconds=0, steps=3)


def figures(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_tiny_table_is_printed_where_there_is_no_ray() -> None:
    options = ["--size", "tiny", "--seconds", "0", "--repeats", "1", "--steps", "2"]
    options += ["--rows", "LoRA, checkpointing"]
    done = subprocess.run(
        [sys.executable, "-c", RUN + "sys.exit(gpu.main())", *options],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    said = done.stdout
    assert "64 px, 64 condition tokens, training on batches of 4, sampling in 2 steps" in said
    assert f"torch {torch.__version__}" in said and "python -m benchmarks.gpu --size tiny" in said
    table = {figures(line)[0]: figures(line) for line in said.splitlines() if line[:2] == "| "}
    measured = table["LoRA, checkpointing"]
    assert list(table)[1:] == ["LoRA, checkpointing", "LoRA, checkpointing, features online"]
    assert float(measured[1].replace(",", "")) > 0 and float(measured[2]) > 0
    assert measured[4] == measured[5] == "–"  # neither a peak nor the memory of a CPU is known


@pytest.mark.parametrize(
    ("trouble", "note", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried …"), "out of memory", 0),
        (ConfigError("needs torchao or bitsandbytes"), "needs torchao or bitsandbytes", 0),
        (ValueError("a\nb | c"), "FAILED: ValueError: a b / c", 1),
    ],
)
def test_a_row_in_trouble_says_so_and_the_next_is_measured(
    capsys: pytest.CaptureFixture[str], trouble: Exception, note: str, status: int
) -> None:
    def fail(_: Bench) -> Measured:
        raise trouble

    rows = [
        Row("one", fail),
        Row("other", lambda _: Measured(0.5, 4, 100e12, 12_340_000_000, "well")),
    ]
    assert gpu.report(rows, bench(), limit=100, peak_flops=1000e12) == status
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [gpu.HEAD, gpu.RULE]
    assert figures(lines[2]) == ["one", *["–"] * 5, note]
    assert figures(lines[3]) == [
        "other", "500.0", "8.00", "200.00", "20.0%", "12.3 GB", "well",
    ]  # fmt: skip
    assert len(lines) == 4


def test_rows_for_which_no_time_is_left_are_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def measure(_: Bench) -> Measured:
        nonlocal now
        now += 40.0
        return Measured(1.0, 1, 1e12, 0)

    monkeypatch.setattr(gpu.time, "monotonic", lambda: now)
    rows = [Row(name, measure) for name in ("first", "second", "third", "fourth")]
    assert gpu.report(rows, bench(), limit=100, peak_flops=0) == 0
    said = capsys.readouterr().out
    assert "| first |" in said and "| second |" in said and "| third |" not in said
    assert said.endswith("Left out for want of time (--minutes): third; fourth.\n")


def test_every_row_has_a_name_of_its_own() -> None:
    names = [row.name for row in gpu.every_row()]
    assert len(set(names)) == len(names) == 15
    assert names[:2] == ["full, AdamW, checkpointing", "LoRA, checkpointing"]


@pytest.mark.parametrize("method", [gpu.FULL, gpu.LORA])
def test_a_step_trains_what_its_method_says(method: gpu.Method) -> None:
    step = gpu.TrainingStep(method, bench(), checkpointed=False)
    weights = {name: p.detach().clone() for name, p in step._module.named_parameters()}
    step.on_random_features()
    moved = {
        name for name, p in step._module.named_parameters() if not torch.equal(p, weights[name])
    }
    if method is gpu.LORA:  # where B is zero, A has no gradient yet
        assert moved == {name for name in weights if "lora_B" in name} and moved
    else:
        assert len(moved) > 0.9 * len(weights)
    again = gpu.TrainingStep(method, bench(), checkpointed=True)
    assert again.flops / step.flops == pytest.approx((2 + method.backward) / (1 + method.backward))


def test_frozen_parts_give_the_features_that_a_step_takes() -> None:
    one = bench()
    hidden, mask, target, source = gpu.OnlineFeatures(one).features()
    assert hidden.shape == (2, one.size.tokens, one.size.hidden) and bool(mask.all())
    assert target.shape == source.shape == (2, *one.size.latent)
    step = gpu.TrainingStep(gpu.LORA, one, checkpointed=True)
    step(hidden, mask, target, source)
    online = gpu.train_online(gpu.LORA, one)
    assert online.flops > step.flops and " x the " in online.note


def test_compiled_rows_are_compiled_after_their_work_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled = []
    monkeypatch.setattr(Painter, "compile_blocks", lambda self: compiled.append(self))
    plain = gpu.train(gpu.FULL, bench(), checkpointed=False)
    assert not compiled
    fast = gpu.train(gpu.FULL, bench(), checkpointed=False, compiled=True)
    assert len(compiled) == 1 and fast.flops == plain.flops
    two, one = (gpu.paint_batch(rows, bench(), compiled=True) for rows in (2, 1))
    assert len(compiled) == 3 and two.samples == 2
    # The smallest products of a single row are computed with some rows more.
    assert two.flops == pytest.approx(2 * one.flops, rel=0.02)


def test_products_and_attention_are_counted() -> None:
    layer, states = nn.Linear(8, 16, bias=False), torch.randn(5, 8)
    assert gpu.count(lambda: layer(states)) == 2 * 5 * 8 * 16
    query, key = torch.randn(1, 2, 6, 4), torch.randn(1, 2, 7, 4)
    attend = functional.scaled_dot_product_attention
    assert gpu.count(lambda: attend(query, key, key)) == 2 * 2 * (2 * 6 * 7 * 4)


def test_the_published_sizes_are_those_of_the_published_parts() -> None:
    size = gpu.make_size("published")
    assert (size.latent, size.hidden) == ((32, 32, 32), 2048)
    with torch.device("meta"):
        qwen = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(**size.config.understanding.architecture)
        )
        dc_ae = AutoencoderDC(**size.config.autoencoder.architecture)
        latent = dc_ae.encode(torch.empty(1, 3, 1024, 1024)).latent
    assert latent.shape[1:] == size.latent
    assert sum(p.numel() for p in qwen.parameters()) == 3_754_622_976
    assert sum(p.numel() for p in dc_ae.parameters()) == 312_250_275
    sections = ("understanding", "connector", "painter", "autoencoder")
    assert all(getattr(size.config, name).weights is None for name in sections)


def test_a_card_is_known_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert gpu.peak(torch.device("cuda")) == 989e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some Card")
    assert gpu.peak(torch.device("cuda")) == gpu.peak(torch.device("cpu")) == 0
