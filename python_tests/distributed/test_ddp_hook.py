"""trained_entries_hook on real ranks: the training of dense DDP, with 5 % on the wire.

All cases with the same number of ranks run in the same processes, one after the other.
"""

from __future__ import annotations

import pytest
import torch
from helpers.ranks import run_ranks

MODES = {
    "plain": {},
    "no_sync": {"micro": 3},
    "accumulated in step": {"micro": 2, "synchronize": True},
    "static graph": {"ddp": {"static_graph": True}},
    "bucket view": {"ddp": {"gradient_as_bucket_view": True}},
    "unused on one rank": {"ddp": {"find_unused_parameters": True}, "unused": (1,)},
    "unused on all ranks": {"ddp": {"find_unused_parameters": True}, "unused": (0, 1, 2)},
    "many buckets": {"ddp": {"bucket_cap_mb": 0.001}},
    "bf16": {"dtype": torch.bfloat16},
    "fp16": {"dtype": torch.float16, "scaler": True},
    "tied": {"tied": True},
    "packed": {"packed": True},
    "loaded": {"load": 3},
    "lift norm": {"options": {"max_grad_norm": 0.01}},
    "gradient": {"options": {"selection": "gradient"}},
    "gradient, each step": {"options": {"selection": "gradient", "refresh_interval": 1}},
    "gradient, spread": {"options": {"selection": "gradient", "refresh_schedule": "spread"}},
    "gradient, no_sync": {"options": {"selection": "gradient"}, "micro": 2},
    "gradient, skipped": {"options": {"selection": "gradient"}, "scaler": True, "spoilt": (1, 2)},
    "skipped": {"scaler": True, "spoilt": (0, 3)},
}
THREE = ("plain", "unused on one rank", "gradient", "bf16")
WORKER = '''
import contextlib, copy, io
from lift_kernels import trained_entries_hook
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

class Net(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.side, self.c = nn.Linear(12, 20), nn.Linear(20, 20), nn.Linear(20, 20, bias=False)
        self.norm, self.out = nn.LayerNorm(20), nn.Linear(20, 6)
        if tied:
            self.c.weight = self.side.weight

    def forward(self, x, unused=False):
        h = torch.tanh(self.a(x))
        return self.out(self.norm(self.c(h if unused else h + torch.tanh(self.side(h)))))

MASK = dict(rank=3, density=0.2)

def make(tied=False, dtype=torch.float32, packed=False, options={}, **ignored):
    model = Net(tied).to(dtype)
    groups = (pack_gradients if packed else lift_param_groups)(model, **(MASK if packed else {}))
    rest = [(name, p) for name, p in model.named_parameters() if p.dim() == 1 and name.startswith(("a.b", "norm"))]
    groups.append({"params": rest, "lift": False})  # The optimizer does not hold the other biases.
    chosen = dict(MASK, lr=0.01, refresh_interval=3, process_group=dist.group.WORLD)
    return model, LiftAdamW(groups, **chosen | options)

def losses(model, step, rank, micro=1, unused=(), spoilt=(), **ignored):
    for part in range(micro):
        x = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(10 * step + part))[rank]
        skip = {"unused": True} if rank in unused and step % 2 == 1 else {}
        loss = model(x.to(next(model.parameters()).dtype), **skip).square().mean()
        yield loss * (torch.inf if step in spoilt and rank == 1 else 1)

def result(model, optimizer):
    lists = [entry["indices"].clone() for entry in optimizer.state.values() if "indices" in entry]
    return [p.detach().clone() for p in model.parameters()], lists, optimizer.grad_norm

def train(hooked, steps=8, ddp={}, micro=1, synchronize=False, scaler=False, clip=None, load=None, **case):
    model, optimizer = make(**case)
    parallel = DistributedDataParallel(model, **ddp)
    if hooked:
        parallel.register_comm_hook(optimizer, trained_entries_hook)
    scale = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=100) if scaler else None
    for step in range(steps):
        parts = losses(parallel, step, rank, micro, **case)
        for part in range(micro):
            with contextlib.nullcontext() if synchronize or part == micro - 1 else parallel.no_sync():
                loss = next(parts)
                (loss if scale is None else scale.scale(loss)).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        if scale is None:
            optimizer.step()
        else:
            scale.step(optimizer)
            scale.update()
        optimizer.zero_grad()
        model.zero_grad()
        if step == load:
            saved = io.BytesIO()
            torch.save(optimizer.state_dict(), saved)
            saved.seek(0)
            optimizer.load_state_dict(torch.load(saved))
    return result(model, optimizer)

def train_alone(clip=None, steps=8):
    """One process with the data of all ranks."""
    model, optimizer = make(options={"process_group": "independent"})
    for step in range(steps):
        sums = [torch.zeros_like(p) for p in model.parameters()]
        for of_rank in range(world):
            model.zero_grad()
            next(losses(model, step, of_rank)).backward()
            for total, p in zip(sums, model.parameters()):
                total += p.grad / world
        for total, p in zip(sums, model.parameters()):
            p.grad = total
            if "indices" in optimizer.state[p]:  # A clipped norm is that of the trained entries.
                indices = optimizer.state[p]["indices"].long()
                p.grad = torch.zeros_like(p).flatten().scatter_(0, indices, total.flatten()[indices]).view(p.shape)
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return result(model, optimizer)
'''
RUN = """
join()
found = {name: (train(True, **case), train(False, **case)) for name, case in CASES.items()}
found["clip"] = train(True, clip=0.02)
found["alone"], found["alone, clip"] = train_alone(), train_alone(clip=0.02)
torch.save(found, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


def same(one, other):
    """Whether two results have the same weights and index lists, to the bit."""
    (weights, lists, _), (others, other_lists, _) = one, other
    equal = [len(a) == len(b) and all(map(torch.equal, a, b)) for a, b in ((weights, others), (lists, other_lists))]
    return all(equal)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """By number of ranks, the results of each."""
    results = {}
    for world, names in ((2, MODES), (3, THREE)):
        folder = tmp_path_factory.mktemp("ranks")
        run_ranks(f"{WORKER}\nCASES = { ({name: MODES[name] for name in names})!r}\n{RUN}", world, folder)
        results[world] = [torch.load(folder / f"{rank}.pt") for rank in range(world)]
    return results


@pytest.mark.slow
@pytest.mark.parametrize("name", MODES)
def test_the_hook_trains_as_dense_ddp(ranks, name):
    """To the bit: gloo adds two numbers, and their order does not matter."""
    (hooked, dense), (other, _) = (of_rank[name] for of_rank in ranks[2])
    assert same(hooked, other), "the ranks differ"
    assert same(hooked, dense), "another training than that of dense DDP"


@pytest.mark.slow
@pytest.mark.parametrize("name", THREE)
def test_three_ranks_stay_equal(ranks, name):
    """Sums of three numbers depend on their order, which may be another one for shorter vectors."""
    hooked, dense = ranks[3][0][name]
    assert all(same(hooked, of_rank[name][0]) for of_rank in ranks[3])
    for a, b in zip(hooked[0], dense[0]):
        torch.testing.assert_close(a, b, rtol=0, atol=(2**-8 if name == "bf16" else 1e-6) * float(b.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("clip", ["", ", clip"])
def test_ranks_train_as_one_process_with_all_data(ranks, world, clip):
    """Two ranks do to the bit. The order of three numbers in a sum is gloo's."""
    alone = ranks[world][0][f"alone{clip}"]
    for of_rank in ranks[world]:
        found = of_rank["clip"] if clip else of_rank["plain"][0]
        assert same(found, alone) or world == 3
        assert all(map(torch.equal, found[1], alone[1]))
        for a, b in zip(found[0], alone[0]):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * float(b.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_stay_equal_where_torch_clips(ranks, world):
    """Gradients are zero beside the trained entries, so clip_grad_norm_ sees one norm."""
    assert all(same(of_rank["clip"], ranks[world][0]["clip"]) for of_rank in ranks[world])
    assert not same(ranks[world][0]["clip"], ranks[world][0]["plain"][0])


REFUSALS = """
join()
sent = []
real = dist.all_reduce

def counted(tensor, *arguments, **options):
    sent.append((tensor.numel(), tensor.numel() * tensor.element_size()))
    return real(tensor, *arguments, **options)

dist.all_reduce = counted

def traffic(hook, state_of, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64)).to(dtype)
    groups = lift_param_groups(model, freeze_rest=True)
    optimizer = LiftAdamW(groups, rank=8, density=0.05, process_group=dist.group.WORLD)
    parallel = DistributedDataParallel(model)
    parallel.register_comm_hook(state_of(optimizer), hook)
    steps = []
    for step in range(3):
        sent.clear()
        parallel(torch.randn(2, 5, 64, dtype=dtype)[rank]).square().mean().backward()
        steps.append([sum(column) for column in zip(*sent)])
        optimizer.step()
        optimizer.zero_grad()
    return steps

found = {}
for dtype in (torch.float32, torch.bfloat16):
    found["sent", dtype] = traffic(trained_entries_hook, lambda optimizer: optimizer, dtype)
    found["sent dense", dtype] = traffic(allreduce_hook, lambda optimizer: dist.group.WORLD, dtype)

def said(state_of, **options):
    model, optimizer = make(options=options)
    parallel = DistributedDataParallel(model)
    parallel.register_comm_hook(state_of(optimizer), trained_entries_hook)
    try:
        next(losses(parallel, 0, rank)).backward()
    except Exception as error:
        return f"{type(error).__name__}: {error}"

found["no group"] = said(lambda optimizer: optimizer, process_group=None)
found["independent"] = said(lambda optimizer: optimizer, process_group="independent")
found["no optimizer"] = said(lambda optimizer: torch.optim.AdamW(optimizer.param_groups[0]["params"]))

model, optimizer = make(options=dict(selection="gradient"))
parallel = DistributedDataParallel(model)
parallel.register_comm_hook(optimizer, trained_entries_hook)
next(losses(parallel, 0, rank)).backward()
optimizer.refresh()  # of whole gradients
next(losses(parallel, 0, rank)).backward()
before = copy.deepcopy(optimizer.state_dict())
try:
    optimizer.refresh()
except RuntimeError as error:
    found["refresh"] = str(error)
found["states"] = before, optimizer.state_dict()
optimizer.step()
optimizer.zero_grad()
next(losses(model, 1, rank)).backward()
for p in model.parameters():
    dist.all_reduce(p.grad)
optimizer.refresh()
found["by hand"] = optimizer.last_refresh.overlap, result(model, optimizer)
for group in optimizer.param_groups:  # changed between backward and step, which the hook cannot know
    group["refresh_interval"] = 100
next(losses(parallel, 2, rank)).backward()
optimizer.param_groups[0]["refresh_interval"] = 1
try:
    optimizer.step()
except RuntimeError as error:
    found["interval"] = str(error)
optimizer.zero_grad()
next(losses(parallel, 3, rank)).backward()
optimizer.step()
found["after"] = result(model, optimizer)
torch.save(found, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(WORKER + REFUSALS, 2, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_sends_the_trained_entries_alone(found, dtype):
    """k values of the dtype of the gradient for each matrix, 5 % of dense DDP; all before masks."""
    entries, size = 2 * 64 * 96, dtype.itemsize
    trained = 2 * round(0.05 * 64 * 96)
    for of_rank in found:
        assert of_rank["sent dense", dtype] == [[entries, entries * size]] * 3
        assert of_rank["sent", dtype] == [[entries, entries * size]] + [[trained, trained * size]] * 2
    assert trained < 0.06 * entries


def test_the_hook_says_what_it_needs(found):
    for of_rank in found:
        for name in ("no group", "independent"):
            assert "over the ranks of its LiftAdamW, which has none; give LiftAdamW(process_group=...)" in of_rank[name]
        assert "needs the LiftAdamW as its state, register_comm_hook(optimizer, trained_" in of_rank["no optimizer"]
        assert of_rank["no optimizer"].endswith("got AdamW")


def test_no_mask_is_made_from_gradients_whose_rest_is_zero(found):
    for of_rank in found:
        for case in ("refresh", "interval"):
            assert "a.weight has a gradient of which trained_entries_hook has averaged the entries" in of_rank[case]
            assert "With selection='gradient' let refresh_interval= make the masks" in of_rank[case]
        before, after = of_rank["states"]
        assert str(before) == str(after)


def test_the_ways_out_give_masks_that_are_equal(found):
    """Gradients averaged by hand, and the next step of a schedule."""
    (overlap, mine), (_, theirs) = (of_rank["by hand"] for of_rank in found)
    assert same(mine, theirs) and overlap < 1
    assert same(found[0]["after"], found[1]["after"])
