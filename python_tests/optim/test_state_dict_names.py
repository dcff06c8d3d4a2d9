"""A loaded state belongs to the parameters of its names, in any order, and on their devices."""

from __future__ import annotations

import io

import pytest
import torch
from helpers.optimizers import OPTIONS, assert_same, make_weights, set_gradients, snapshot, train
from torch import nn

from lift_kernels import LiftAdamW, lift_param_groups, pack_gradients
from lift_kernels.checkpoint.training_state import load_checkpoint, save_checkpoint
from lift_kernels.optim import hyperparameters, packed_state

NAMES = ("layers.0.weight", "layers.1.weight", "layers.2.weight", "norm.weight")
SHAPES = ((24, 40), (24, 40), (24, 40), (17,))  # matrices of one shape, which only their names distinguish


def saved_run():
    """Weights by name after two steps, and their optimizer."""
    weights = dict(zip(NAMES, make_weights(SHAPES)))
    optimizer = LiftAdamW(list(weights.items()), **OPTIONS, refresh_interval=None)
    train(optimizer, range(2))
    return weights, optimizer


def copies(weights):
    return {name: nn.Parameter(w.detach().clone()) for name, w in weights.items()}


def step_alike(*runs):
    """Take one step of each (weights by name, optimizer), with the same gradients by name."""
    for weights, optimizer in runs:
        set_gradients((weights[name] for name in NAMES), 7)
        optimizer.step()


def same_state(one, other, optimizer, loaded):
    """Check that weights and state are equal to the bit, name by name."""
    for name in NAMES:
        assert torch.equal(one[name], other[name]), name
        expected, found = optimizer.state[one[name]], loaded.state[other[name]]
        assert expected.keys() == found.keys()
        assert all(torch.equal(value, found[key]) for key, value in expected.items()), name


@pytest.mark.parametrize("order", [(3, 2, 1, 0), (1, 2, 0, 3)])
def test_parameters_in_another_order(order):
    """Masks and moments follow the names, and the next step has the bits of the saved run."""
    weights, optimizer = saved_run()
    other = copies(weights)
    loaded = LiftAdamW([(NAMES[i], other[NAMES[i]]) for i in order], **OPTIONS, refresh_interval=None)
    loaded.load_state_dict(optimizer.state_dict())
    assert loaded.param_groups[0]["param_names"] == [NAMES[i] for i in order]
    same_state(weights, other, optimizer, loaded)
    step_alike((weights, optimizer), (other, loaded))
    same_state(weights, other, optimizer, loaded)
    assert not torch.equal(optimizer.state[weights[NAMES[0]]]["indices"], optimizer.state[weights[NAMES[1]]]["indices"])


def test_groups_in_another_order():
    """Each group finds its own options, also an empty group."""

    def grouped(weights, order):
        named = list(weights.items())
        groups = [
            {"params": named[:2], "lr": 0.1},
            {"params": named[2:3], "lr": 0.2},
            {"params": named[3:], "lr": 0.3},
            {"params": [], "param_names": [], "lr": 0.4},
        ]
        return LiftAdamW([groups[i] for i in order], **OPTIONS, refresh_interval=None)

    weights = dict(zip(NAMES, make_weights(SHAPES)))
    optimizer = grouped(weights, (0, 1, 2, 3))
    train(optimizer, range(2))
    other = copies(weights)
    loaded = grouped(other, (2, 3, 0, 1))
    for group in loaded.param_groups:
        group["lr"] = 9.0
    loaded.load_state_dict(optimizer.state_dict())
    assert [group["lr"] for group in loaded.param_groups] == [0.3, 0.4, 0.1, 0.2]
    assert [group["param_names"] for group in loaded.param_groups] == [["norm.weight"], [], list(NAMES[:2]), [NAMES[2]]]
    step_alike((weights, optimizer), (other, loaded))
    same_state(weights, other, optimizer, loaded)


RENAMED = [
    (
        ("layers.0.weight", "layers.1.weight", "layers.3.weight", "norm.weight"),
        "only it has layers.2.weight, only this optimizer has layers.3.weight;",
    ),
    (
        ("module.layers.0.weight", "module.layers.1.weight", "module.layers.3.weight", "module.norm.weight"),
        "only it has layers.2.weight, only this optimizer has module.layers.3.weight;",
    ),
    (NAMES[:3], "only it has norm.weight, only this optimizer has none;"),
]


@pytest.mark.parametrize(("names", "message"), RENAMED)
def test_other_names_are_refused(names, message):
    _, optimizer = saved_run()
    loaded = LiftAdamW(list(zip(names, make_weights(SHAPES))), **OPTIONS)
    train(loaded, [0])
    before = snapshot(loaded)
    with pytest.raises(ValueError, match=message):
        loaded.load_state_dict(optimizer.state_dict())
    assert_same(snapshot(loaded), before)


WRAPPED = {
    "DDP": lambda name: f"module.{name}",
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "both": lambda name: f"_orig_mod.module.{name}",
    "one layer": lambda name: name.replace("layers.1.", "layers.1._orig_mod."),
    "checkpointed layers": lambda name: name.replace("layers.0.", "layers.0._checkpoint_wrapped_module."),
    "FSDP": lambda name: f"_fsdp_wrapped_module.{name}",
}


@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize("wrapped", ["saved", "loading"])
def test_names_that_a_wrapper_changed_on_one_side(wrapper, wrapped):
    """They match, in any order, and the optimizer keeps its own."""
    weights, optimizer = saved_run()
    saved, other = optimizer.state_dict(), copies(weights)
    wrap = WRAPPED[wrapper]
    if wrapped == "saved":
        saved["param_groups"][0]["param_names"] = list(map(wrap, NAMES))
    own = [(name if wrapped == "saved" else wrap(name), other[name]) for name in NAMES[::-1]]
    loaded = LiftAdamW(own, **OPTIONS, refresh_interval=None)
    loaded.load_state_dict(saved)
    assert loaded.param_groups[0]["param_names"] == [name for name, _ in own]
    same_state(weights, other, optimizer, loaded)
    step_alike((weights, optimizer), (other, loaded))
    same_state(weights, other, optimizer, loaded)


def test_packed_layers_of_a_wrapped_model():
    """``module.0.values`` is ``0.weight``."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 20))
    plain = LiftAdamW(lift_param_groups(model), rank=3, density=0.2)
    model(torch.ones(3, 20)).sum().backward()
    plain.step()
    (group,) = pack_gradients(model, rank=3, density=0.2)
    names = [(f"module.{name}", values) for name, values in group["params"][::-1]]
    packed = LiftAdamW([group | {"params": names}], rank=3, density=0.2)
    packed.load_state_dict(plain.state_dict())
    for i in (0, 2):
        expected = plain.state_dict()["state"][i // 2]["exp_avg"]
        assert torch.equal(packed.state[model[i].values]["exp_avg"], expected)


def test_names_that_would_become_one_without_their_wrapper_are_not_matched():
    """A user's own module may be called ``module``."""
    names = ("module.a.weight", "a.weight")
    weights = make_weights(SHAPES[:2])
    optimizer = LiftAdamW(list(zip(names, weights)), **OPTIONS)
    train(optimizer, [0])
    loaded = LiftAdamW(list(zip(("a.weight", "b.weight"), make_weights(SHAPES[:2]))), **OPTIONS)
    with pytest.raises(ValueError, match=r"only it has module\.a\.weight, only this optimizer has b\.weight"):
        loaded.load_state_dict(optimizer.state_dict())


def test_other_groups_are_refused():
    weights, optimizer = saved_run()
    named = list(copies(weights).items())
    loaded = LiftAdamW([{"params": named[:1]}, {"params": named[1:]}], **OPTIONS)
    with pytest.raises(
        ValueError, match=r"layers.0.weight shares its group of the state dict with layers.1.weight.* with none"
    ):
        loaded.load_state_dict(optimizer.state_dict())
    assert not any(loaded.state.values())


def test_names_that_repeat():
    """Two models in one optimizer may share names.

    The same order loads. Another order is ambiguous and refused.
    """
    names = ("a.weight", "b.weight", "a.weight", "c.weight")
    weights = make_weights(SHAPES)
    optimizer = LiftAdamW(list(zip(names, weights)), **OPTIONS, refresh_interval=None)
    train(optimizer, range(2))
    loaded = LiftAdamW(list(zip(names, make_weights(SHAPES))), **OPTIONS)
    loaded.load_state_dict(optimizer.state_dict())
    for p, q in zip(weights, loaded.param_groups[0]["params"]):
        assert all(torch.equal(value, loaded.state[q][key]) for key, value in optimizer.state[p].items())
    swapped = LiftAdamW(list(zip(names[::-1], make_weights(SHAPES)[::-1])), **OPTIONS)
    with pytest.raises(ValueError, match="the state dict has more than one parameter named a.weight"):
        swapped.load_state_dict(optimizer.state_dict())


def test_one_side_without_names_goes_by_position():
    weights, optimizer = saved_run()
    saved = optimizer.state_dict()
    unnamed = LiftAdamW(list(copies(weights).values()), **OPTIONS)
    unnamed.load_state_dict(saved)
    del saved["param_groups"][0]["param_names"]
    named = LiftAdamW([(f"other.{name}", w) for name, w in copies(weights).items()], **OPTIONS)
    named.load_state_dict(saved)
    for p, q, r in zip(weights.values(), *(o.param_groups[0]["params"] for o in (unnamed, named))):
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, unnamed.state[q][key]) and torch.equal(value, named.state[r][key])


@pytest.mark.parametrize("packed_first", [True, False])
def test_packed_and_matrix_mode_load_into_each_other(packed_first):
    """``0.values`` is ``0.weight``, in any order."""

    def build(packed, reverse=False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 20))
        options = {"rank": 3, "density": 0.2}
        (group,) = pack_gradients(model, **options) if packed else lift_param_groups(model)
        params = group["params"][::-1] if reverse else group["params"]
        return model, LiftAdamW([group | {"params": params}], lr=0.1, refresh_interval=None, **options)

    def step(model, optimizer):
        model(torch.ones(3, 20)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    (model, optimizer), (other, loaded) = build(packed_first), build(not packed_first, reverse=True)
    step(model, optimizer)
    other.load_state_dict(model.state_dict())
    loaded.load_state_dict(optimizer.state_dict())
    kind = "weight" if packed_first else "values"
    assert loaded.param_groups[0]["param_names"] == [f"2.{kind}", f"0.{kind}"]
    for run in ((model, optimizer), (other, loaded)):
        step(*run)
    for i in (0, 2):
        torch.testing.assert_close(other[i].weight, model[i].weight, rtol=0, atol=1e-6)


def test_an_entry_of_no_group():
    weights, optimizer = saved_run()
    saved = optimizer.state_dict()
    saved["state"][9] = saved["state"].pop(1)
    loaded = LiftAdamW(list(copies(weights).items())[::-1], **OPTIONS)
    with pytest.raises(ValueError, match="an entry for parameter 9, which is in none of its groups"):
        loaded.load_state_dict(saved)


def dense_and_sparse(device):
    weights = dict(zip(NAMES, make_weights(SHAPES, device=device)))
    named = list(weights.items())
    groups = [{"params": named[:2]}, {"params": named[2:], "lift": False}]  # a dense matrix and a vector
    return weights, LiftAdamW(groups, **OPTIONS, refresh_interval=None)


def test_the_state_goes_to_the_device_of_its_parameter(monkeypatch):
    """torch leaves a dense ``step`` on the device of the file, which the fused step refuses.

    The meta device stands in for a GPU. Its weights would be refused, for they have no values.
    """
    for module in (hyperparameters, packed_state):
        monkeypatch.setattr(module, "check_matrix", lambda matrix, name: None)
    _, optimizer = dense_and_sparse("cpu")
    train(optimizer, range(2))
    weights, loaded = dense_and_sparse("meta")
    loaded.load_state_dict(optimizer.state_dict())
    for name in NAMES[2:]:
        assert loaded.state[weights[name]].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert loaded.state[weights[name]]["step"].dtype == torch.float32
    assert {t.device.type for entry in loaded.state.values() for t in entry.values()} == {"meta"}


def through_torch_load(state, folder):
    torch.save(state, folder / "state.pt")
    return torch.load(folder / "state.pt", map_location="cpu", weights_only=True)


def through_checkpoint(state, folder):
    save_checkpoint(folder / "state.safetensors", state)
    return load_checkpoint(folder / "state.safetensors")


@pytest.mark.parametrize("through", [through_torch_load, through_checkpoint])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_run_goes_on_from_a_state_on_the_cpu(tmp_path, device, through):
    """The state of sparse and dense parameters is loaded to the CPU first.

    The parameters are on the CPU or on a GPU.
    """
    weights, optimizer = dense_and_sparse(device)
    train(optimizer, range(2))
    saved = through(
        {"weights": {n: w.detach() for n, w in weights.items()}, "optimizer": optimizer.state_dict()}, tmp_path
    )
    other, loaded = dense_and_sparse(device)
    for name, w in other.items():
        w.data.copy_(saved["weights"][name])
    loaded.load_state_dict(saved["optimizer"])
    assert {t.device.type for entry in loaded.state.values() for t in entry.values()} == {device}
    step_alike((weights, optimizer), (other, loaded))
    same_state(weights, other, optimizer, loaded)


def test_a_file_keeps_names():
    """A state that a user loads with torch.load is matched by names too."""
    weights, optimizer = saved_run()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = copies(weights)
    loaded = LiftAdamW(list(other.items())[::-1], **OPTIONS)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    same_state(weights, other, optimizer, loaded)


@pytest.mark.parametrize("named", [True, False])
def test_entries_are_found_by_the_ids_of_their_groups(named):
    """A user may put the saved groups into the order of the optimizer, as torch asks for.

    Ids go with their groups.
    """

    def grouped(weights, order):
        params = list(weights.items()) if named else list(weights.values())
        groups = [{"params": params[:1]}, {"params": params[1:2]}]
        return LiftAdamW([groups[i] for i in order], **OPTIONS, refresh_interval=None)

    weights = dict(list(zip(NAMES, make_weights(SHAPES)))[:2])
    optimizer = grouped(weights, (0, 1))
    train(optimizer, range(2))
    saved = optimizer.state_dict()
    saved["param_groups"].reverse()
    other = copies(weights)
    loaded = grouped(other, (1, 0))
    loaded.load_state_dict(saved)
    for name in NAMES[:2]:
        expected, found = optimizer.state[weights[name]], loaded.state[other[name]]
        assert all(torch.equal(value, found[key]) for key, value in expected.items()), name


def test_groups_that_move_are_named_where_a_scheduler_is(caplog):
    """In torch the state of a scheduler goes by position."""
    weights, optimizer = saved_run()
    named = list(weights.items())
    optimizer = LiftAdamW([{"params": named[:1], "lr": 0.1}, {"params": named[1:], "lr": 0.2}], **OPTIONS)
    saved = optimizer.state_dict()
    loaded = LiftAdamW([{"params": named[1:]}, {"params": named[:1]}], **OPTIONS)
    loaded.load_state_dict(saved)
    assert not caplog.text
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    loaded.load_state_dict(optimizer.state_dict())
    assert "a learning rate scheduler's own state goes by position" in caplog.text


def test_hooks_see_and_change_the_whole_state():
    """register_load_state_dict_pre_hook is torch's way to rename parameters.

    A post-hook sees the loaded masks.
    """
    weights, optimizer = saved_run()
    other = copies(weights)
    loaded = LiftAdamW([(f"module.{name}", w) for name, w in other.items()], **OPTIONS)
    seen = []

    def rename(optimizer, state_dict):
        for group in state_dict["param_groups"]:
            group["param_names"] = [f"module.{name}" for name in group["param_names"]]
        for entry in state_dict["state"].values():
            entry["exp_avg"] = entry["exp_avg"] + 1
        return state_dict

    loaded.register_load_state_dict_pre_hook(rename)
    loaded.register_load_state_dict_post_hook(
        lambda o: seen.append({name: o.state[w].keys() for name, w in other.items()})
    )
    loaded.load_state_dict(optimizer.state_dict())
    assert len(seen) == 1 and all({"step", "exp_avg"} <= keys for keys in seen[0].values())
    assert {"indices", "exp_avg_sq"} <= seen[0][NAMES[0]]
    for name in NAMES:
        assert torch.equal(loaded.state[other[name]]["exp_avg"], optimizer.state[weights[name]]["exp_avg"] + 1)
    assert optimizer.param_groups[0]["param_names"] == list(NAMES), "a saved state shares no list with its optimizer"


def test_a_module_with_values_of_its_own():
    """``a.values`` and ``a.weight`` are two different parameters here."""
    names = ("a.values", "a.weight")
    weights = make_weights(SHAPES[:2])
    optimizer = LiftAdamW(list(zip(names, weights)), **OPTIONS, refresh_interval=None)
    train(optimizer, range(2))
    other = make_weights(SHAPES[:2])
    loaded = LiftAdamW([(names[1], other[1]), (names[0], other[0])], **OPTIONS)
    loaded.load_state_dict(optimizer.state_dict())
    for p, q in zip(weights, other):
        assert all(torch.equal(value, loaded.state[q][key]) for key, value in optimizer.state[p].items())


def test_a_state_whose_keys_are_names():
    """What torch.distributed.checkpoint hands over: names in place of ids."""
    weights, optimizer = saved_run()
    saved = optimizer.state_dict()
    saved["state"] = {NAMES[i]: entry for i, entry in saved["state"].items()}
    saved["param_groups"][0]["params"] = list(NAMES)
    other = copies(weights)
    loaded = LiftAdamW(list(other.items())[::-1], **OPTIONS, refresh_interval=None)
    loaded.load_state_dict(saved)
    same_state(weights, other, optimizer, loaded)
