"""Gradients that hooks pack, under DistributedDataParallel: LiftAdamW averages them itself.

All cases with the same number of ranks run in the same processes, one after the other.
"""

from __future__ import annotations

import pytest
import torch
from helpers.ranks import run_ranks

CASES = {
    "plain": {},
    "no_sync": {"micro": 3},
    "clipped": {"options": {"max_grad_norm": 0.01}},
    "dense layers": {"include": "nothing"},
    "unused on one rank": {"unused": (1,)},
    "unused on all ranks": {"unused": (0, 1, 2)},
    "scaled": {"scaler": True},
    "an infinity on one rank": {"scaler": True, "infinite": 2},
    "raised and repeated": {"raises": 2},
}
WORKER = '''
import contextlib, copy, pickle
from lift_kernels import unpack

class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.Parameter(torch.randn(3, 6, 8))
        self.inp = nn.Linear(12, 8)

    def forward(self, x, unused=False):
        h = self.inp(x)
        return h if unused else torch.einsum("bi,eoi->beo", h, self.experts)

MASK = dict(rank=3, density=0.2)

def make(include=None, options={}):
    model = Experts()
    groups = pack_gradients(model, include="inp", extra="experts", freeze_rest=True, **MASK)
    chosen = dict(lr=0.01, refresh_interval=3, process_group=dist.group.WORLD)
    return model, LiftAdamW(groups, **chosen | options)

def losses(model, step, rank, micro=1, unused=()):
    for part in range(micro):
        x = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(10 * step + part))[rank]
        yield model(x, unused=rank in unused and step % 2 == 1).square().mean()

def result(model, optimizer, *more):
    lists = [entry["indices"].clone() for entry in optimizer.state.values()]
    steps = [entry["step"].clone() for entry in optimizer.state.values()]
    return [model.experts.detach().clone(), model.inp.weight.detach().clone(), *lists, *steps, *more]

def train(parallel, optimizer, steps=range(7), micro=1, unused=(), scaler=False, infinite=None, raises=None):
    model = parallel.module
    scale = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=100) if scaler else None
    for step in steps:
        parts = losses(parallel, step, rank, micro, unused)
        for part in range(micro):
            with contextlib.nullcontext() if part == micro - 1 else parallel.no_sync():
                loss = next(parts)
                (loss if scale is None else scale.scale(loss)).backward()
        if step == infinite and rank == 1:
            model.experts.lift_grad[0] = torch.inf
        if step == raises:
            given = optimizer._sweep.collect
            optimizer._sweep.collect = lambda table: (_ for _ in ()).throw(OSError("once"))
            try:
                optimizer.step()
            except OSError:
                optimizer._sweep.collect = given
        if scale is None:
            optimizer.step()
        else:
            scale.step(optimizer)
            scale.update()
        optimizer.zero_grad()
    return result(model, optimizer, torch.tensor(0.0 if scale is None else scale.get_scale()))

def train_alone(micro=1, unused=(), scaler=False, infinite=None, raises=None, **how):
    """One process with the data of all ranks; halves of losses are exact."""
    how["options"] = {"process_group": "independent"} | how.get("options", {})
    model, optimizer = make(**how)
    for step in range(7):
        sums = {}
        for of_rank in range(world):
            for loss in losses(model, step, of_rank, micro, unused):
                (loss / world).backward()
            for p in model.parameters():
                for key in ("grad", "lift_grad"):
                    if (grad := getattr(p, key, None)) is not None:
                        sums[p, key] = grad + sums.get((p, key), 0)
                        setattr(p, key, None)
        for (p, key), total in sums.items():
            setattr(p, key, total)
        if step != infinite:
            optimizer.step()
        optimizer.zero_grad()
    return result(model, optimizer, torch.tensor(16.0 if scaler else 0.0))

def said(function):
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
'''
RUN = """
join()
found = {}
for name, case in CASES.items():
    how = {key: case.pop(key) for key in ("include", "options") if key in case}
    model, optimizer = make(**how)
    found[name] = train(DistributedDataParallel(model), optimizer, **case), train_alone(**case, **how)
torch.save(found, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """By number of ranks, the results of each."""
    results = {}
    for world, names in ((2, CASES), (3, ("plain", "unused on one rank"))):
        folder = tmp_path_factory.mktemp("ranks")
        run_ranks(f"{WORKER}\nCASES = { ({name: CASES[name] for name in names})!r}\n{RUN}", world, folder)
        results[world] = [torch.load(folder / f"{rank}.pt") for rank in range(world)]
    return results


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_as_one_process_with_all_data(ranks, name):
    """To the bit. The scale of a GradScaler stays, as it does not see packed gradients."""
    (one, alone), (other, _) = (of_rank[name] for of_rank in ranks[2])
    assert all(map(torch.equal, one, other)), "the ranks differ"
    assert all(map(torch.equal, one, alone)), "another training than that of one process"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "unused on one rank"])
def test_three_ranks_train_as_one_process(ranks, name):
    """Thirds are rounded, so only the ranks are equal to the bit."""
    one, alone = ranks[3][0][name]
    assert all(all(map(torch.equal, one, of_rank[name][0])) for of_rank in ranks[3])
    for a, b in zip(one, alone):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * float(b.abs().max()) if b.is_floating_point() else 0)


OTHERS = """
late = make(options=dict(process_group=None))[1] # before there are ranks
join()
found = {}
found["late"] = said(late.step)
found["no group"] = said(lambda: make(options=dict(process_group=None)))
model, optimizer = make(options=dict(process_group="independent"))
parallel = DistributedDataParallel(model)
found["independent"] = train(parallel, optimizer)

alone = dist.new_group([0]), dist.new_group([1])
model, optimizer = make(options=dict(process_group=alone[rank]))
found["a group of one"] = train(DistributedDataParallel(model, process_group=alone[rank]), optimizer)

class Outer(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)

model, optimizer = make()
parallel = DistributedDataParallel(Outer(model))
parallel(torch.randn(5, 12)).square().mean().backward()
found["outer"] = said(optimizer.step)

model, optimizer = make()
model, optimizer = pickle.loads(pickle.dumps((model, optimizer)))
optimizer = LiftAdamW(optimizer.param_groups, lr=0.01, process_group=dist.group.WORLD)
found["pickled"] = train(DistributedDataParallel(model), optimizer)
model, optimizer = make()
model, optimizer = copy.deepcopy((model, optimizer))  # Its group is found again: that of all ranks.
found["copied"] = train(DistributedDataParallel(model), optimizer)
model, optimizer = make()
found["plain"] = train(DistributedDataParallel(model), optimizer)

pair = dist.new_group([0, 1])
model, optimizer = make(options=dict(process_group=pair))
found["pair"] = train(DistributedDataParallel(model, process_group=pair), optimizer)

model, _ = make()
plain = copy.deepcopy(model)  # A copy of the model alone has lost its hooks, so DDP must reduce its gradients.
found["ignored"] = sorted(model._ddp_params_and_buffers_to_ignore), sorted(plain._ddp_params_and_buffers_to_ignore)
unpack(plain)
parallel = DistributedDataParallel(plain)
next(losses(parallel, 0, rank)).backward()
found["reduced"] = plain.experts.grad
unpack(model)
parallel = DistributedDataParallel(model)
next(losses(parallel, 0, rank)).backward()
found["unpacked"] = hasattr(model, "_ddp_params_and_buffers_to_ignore"), model.experts.grad
model = Experts()
DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["inp.bias"])
pack_gradients(model, extra="experts", **MASK)
found["others"] = sorted(DistributedDataParallel(model).parameters_to_ignore)
unpack(model)
found["others, unpacked"] = model._ddp_params_and_buffers_to_ignore
torch.save(found, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(WORKER + OTHERS, 2, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_ranks_without_a_group_are_refused(found):
    for of_rank in found:
        for case in ("late", "no group"):
            said = of_rank[case]
            assert said.startswith("RuntimeError: experts: a hook packs its gradient, which DistributedDataParallel")
            for way in ("LiftAdamW(process_group=...)", "'independent'", "extra="):
                assert way in said


def test_independent_ranks_average_nothing(found):
    for case in ("independent", "a group of one"):
        assert not torch.equal(found[0][case][0], found[1][case][0])


def test_a_wrapper_of_the_packed_model_is_named(found):
    for of_rank in found:
        assert "experts has a packed lift_grad and a dense grad; clear one of them. DistributedData" in of_rank["outer"]
        assert "give pack_gradients the very module that it wraps" in of_rank["outer"]


@pytest.mark.parametrize("case", ["pickled", "copied", "pair"])
def test_copies_and_other_groups_train_alike(found, case):
    for of_rank in found:
        assert all(map(torch.equal, of_rank[case], found[0]["plain"]))


def test_ddp_leaves_out_what_has_a_hook_and_nothing_else(found):
    for of_rank in found:
        assert of_rank["ignored"] == ([".experts", "experts"], [])
        assert torch.equal(of_rank["reduced"], found[0]["reduced"])
        still, reduced = of_rank["unpacked"]
        assert not still and torch.equal(reduced, found[0]["reduced"])
        assert of_rank["others"] == [".experts", "experts", "inp.bias"]
        assert of_rank["others, unpacked"] == ["inp.bias"]
