"""SHiRA adapters: exported to stock peft, imported as a delta, with a mask of principal weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.bits import BF16, FP32
from helpers.files import alter, save
from helpers.small_models import Small, tuned
from helpers.tiny_llama import save_tiny
from peft import PeftModel, ShiraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lift_kernels import LiftAdamW, apply_delta, delta_info, lift_param_groups, principal_indices, save_delta
from lift_kernels.errors import FileError
from lift_kernels.integrations.peft import export_shira, import_shira, shira_mask

IDS = torch.arange(40).reshape(2, 20)


@pytest.fixture(scope="module", params=[FP32, BF16], ids=["fp32", "bf16"])
def trained(request, tmp_path_factory):
    """A saved base model, the same model after training with refreshes, and their delta."""
    folder = tmp_path_factory.mktemp("shira")
    model = load(save_tiny(folder / "small"), request.param)
    model.save_pretrained(folder / "base")
    optimizer = LiftAdamW(lift_param_groups(model, freeze_rest=True), lr=0.02, rank=4, density=0.1, refresh_interval=2)
    for _ in range(5):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_delta(model, folder / "base", folder / "delta")
    return folder, model, request.param


def load(folder, dtype):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def assert_close(actual, expected, base, dtype):
    """Check logits within the rounding error of the dtype, relative to what training changed."""
    with torch.no_grad():
        a, e, b = (model(IDS).logits.float() for model in (actual, expected, base))
    limit = {FP32: 1e-4, BF16: 2e-2}[dtype]
    assert (e - b).abs().max() > 0.5 and (a - e).abs().max() <= limit * (e - b).abs().max()


def test_an_exported_adapter_gives_the_same_logits_in_stock_peft(trained, tmp_path):
    """This holds for a loaded and for a merged adapter."""
    folder, model, dtype = trained
    r = export_shira(folder / "delta", tmp_path / "adapter", str(folder / "base"))
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    info = delta_info(folder / "delta")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, shape in info.shapes.items():
        assert tensors[f"base_model.model.{name.removesuffix('.weight')}.shira_weight"].shape == (r * sum(shape),)
    assert max(info.counts[n] / sum(s) for n, s in info.shapes.items()) <= r
    adapted = PeftModel.from_pretrained(load(folder / "base", dtype), tmp_path / "adapter")
    base = load(folder / "base", dtype)
    assert_close(adapted, model, base, dtype)
    merged = adapted.merge_and_unload()
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            merged.state_dict()[name], p.detach(), rtol=2**-7 if dtype == BF16 else 1e-6, atol=1e-7
        )
    assert_close(merged, model, base, dtype)


def test_an_adapter_loads_where_lift_kernels_is_not_installed(trained, tmp_path):
    folder, _, dtype = trained
    if dtype == FP32:
        return  # starting a process takes seconds, and one form is enough
    export_shira(folder / "delta", tmp_path / "adapter")
    code = (
        "import sys; sys.modules['lift_kernels'] = None\nimport torch\nfrom peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\nbase, adapter, out = sys.argv[1:]\n"
        f"model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype={dtype}), adapter)\n"
        "from safetensors.torch import save_file\n"
        "save_file({'logits': model(torch.arange(40).reshape(2, 20)).logits.detach().float()}, out)\n"
    )
    command = [sys.executable, "-c", code, folder / "base", tmp_path / "adapter", tmp_path / "logits"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(load(folder / "base", dtype), tmp_path / "adapter")
        torch.testing.assert_close(
            load_file(tmp_path / "logits")["logits"], adapted(IDS).logits.float(), rtol=1e-4, atol=1e-4
        )


def test_export_and_import_give_the_delta_back(trained, tmp_path):
    """It is the same to the bit in bf16.

    A difference of fp32 values may need more than 24 bits. Then the sum is off by one ulp.
    """
    folder, model, dtype = trained
    export_shira(folder / "delta", tmp_path / "adapter")
    again = import_shira(tmp_path / "adapter", folder / "base", tmp_path / "delta")
    info = delta_info(folder / "delta")
    assert again.base == info.base and again.settings["method"] == "shira"
    copied = load(folder / "base", dtype)
    apply_delta(copied, tmp_path / "delta")
    same, count = 0, 0
    for (name, p), (_, q) in zip(copied.named_parameters(), model.named_parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0 if dtype == BF16 else 2e-7, atol=0 if dtype == BF16 else 1e-8, msg=name)
        same, count = same + (p == q).sum().item(), count + p.numel()
    assert count - same <= 0.05 * info.entries


def test_an_adapter_trained_by_peft_becomes_a_delta(trained, tmp_path):
    folder, _, dtype = trained
    torch.manual_seed(3)
    config = ShiraConfig(r=2, target_modules=["q_proj", "down_proj"], init_weights=False, random_seed=1)
    adapted = get_peft_model(load(folder / "base", dtype), config)
    adapted.save_pretrained(tmp_path / "adapter")
    info = import_shira(tmp_path / "adapter", folder / "base", tmp_path / "delta")
    assert {name.split(".")[-2] for name in info.counts} == {"q_proj", "down_proj"}
    copied = load(folder / "base", dtype)
    apply_delta(copied, tmp_path / "delta")
    assert_close(copied, adapted.merge_and_unload(), load(folder / "base", dtype), dtype)


def test_the_mask_function_selects_principal_weights(trained):
    """peft trains the k = r (m + n) entries of largest |W_r|.

    It keeps them when the adapter is saved.
    """
    folder, _, dtype = trained
    model = load(folder / "base", dtype)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = ShiraConfig(r=3, mask_type="lift", target_modules=["up_proj", "o_proj"])
    config.mask_fn = shira_mask(rank=4)
    adapted = get_peft_model(model, config)
    layers = {n: m for n, m in adapted.named_modules() if hasattr(m, "shira_indices")}
    assert len(layers) == 4
    for name, layer in layers.items():
        weight = weights[name.removeprefix("base_model.model.") + ".weight"]
        rows, columns = layer.shira_indices["default"].long()
        k = 3 * sum(weight.shape)
        assert torch.equal((rows * weight.shape[1] + columns).int(), principal_indices(weight, 4, k))
    with pytest.raises(ValueError, match="lower r"):
        shira_mask()(torch.nn.Linear(8, 8), 5)


def test_zeros_of_the_padding_change_no_sign(tmp_path):
    """A padded entry of -0.0 stays -0.0 in the imported delta."""
    base, model = Small(), tuned(1)
    with torch.no_grad():
        for m in (base, model):
            m.second.bias.copy_(Small().second.bias)
            m.first.weight[0, :5] = -0.0
    save_delta(model, base, tmp_path / "delta")
    export_shira(tmp_path / "delta", tmp_path / "adapter")
    assert import_shira(tmp_path / "adapter", base, tmp_path / "again").counts == delta_info(tmp_path / "delta").counts


def test_what_shira_cannot_hold_is_refused(tmp_path):
    save_delta(tuned(1), Small(), tmp_path / "bias")
    with pytest.raises(FileError, match="second.bias changed, and SHiRA changes weights of linear layers only"):
        export_shira(tmp_path / "bias", tmp_path / "adapter")
    save_delta({"a.weight": torch.ones(4, 4)}, {"a.weight": torch.zeros(4, 4)}, tmp_path / "dense")
    export_shira(tmp_path / "dense", tmp_path / "adapter")  # exactly 16 = 2 (4 + 4) entries fit
    with pytest.raises(FileError, match="already holds an adapter"):
        export_shira(tmp_path / "dense", tmp_path / "adapter")
    save_delta({"a.weight": torch.ones(3, 4)}, {"a.weight": torch.zeros(3, 4)}, tmp_path / "dense")
    with pytest.raises(FileError, match="fewer than the 14 entries that SHiRA needs for r = 2"):
        export_shira(tmp_path / "dense", tmp_path / "other")
    save_delta(Small(), Small(), tmp_path / "nothing")
    with pytest.raises(FileError, match="changes nothing"):
        export_shira(tmp_path / "nothing", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def adapter(folder: Path, indices, values, name="first", config=None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "SHIRA", "r": 1} | (config or {})))
    parts = {"shira_indices": indices, "shira_weight": values}
    tensors = {f"base_model.model.{name}.{key}": part for key, part in parts.items() if part is not None}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indices": torch.tensor([[0, 30], [0, 0]])}, "an index of first.weight lies outside its 30 x 40 entries"),
        ({"indices": torch.tensor([[0, -1], [0, 0]])}, "lies outside"),
        ({"indices": torch.tensor([[0, 1], [0, 40]])}, "lies outside"),
        ({"indices": torch.zeros(2, 3, dtype=torch.int32)}, "do not fit a matrix"),
        ({"values": None}, "lacks indices or values"),
        ({"name": "third"}, "one tensor that the base lacks, the first third.weight"),
        ({"config": {"peft_type": "LORA"}}, "type LORA; only SHIRA"),
        ({"config": {"modules_to_save": ["head"]}}, "modules_to_save"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(tmp_path, change, message):
    good = {"indices": torch.tensor([[0, 29], [0, 39]]), "values": torch.tensor([1.0, 2.0])}
    info = import_shira(adapter(tmp_path / "good", **good), Small(), tmp_path / "delta")
    assert info.counts == {"first.weight": 2}
    (tmp_path / "delta").unlink()
    with pytest.raises(FileError, match=message):
        import_shira(adapter(tmp_path / "bad", **good | change), Small(), tmp_path / "delta")
    assert not (tmp_path / "delta").exists()


def test_damaged_adapters_are_refused(tmp_path):
    import random

    base = save(Small(), tmp_path / "base.safetensors")
    folder = adapter(tmp_path / "a", torch.tensor([[0, 29], [0, 39]]), torch.tensor([1.0, 2.0]))
    raw, rng = (folder / "adapter_model.safetensors").read_bytes(), random.Random(2)
    for _ in range(100):
        (folder / "adapter_model.safetensors").write_bytes(alter(raw, rng))
        try:
            import_shira(folder, base, tmp_path / "delta")
        except ValueError as error:  # FileError, or a value that became NaN
            assert "\n" not in str(error)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (folder / name).unlink()
        with pytest.raises(FileError, match=name):
            import_shira(folder, base, tmp_path / "delta")
