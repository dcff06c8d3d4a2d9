"""Ranks under DistributedDataParallel skip the same refreshes. A rank that does not is an error."""

from __future__ import annotations

import pytest
import torch
from helpers.ranks import run_ranks

WORKER = """
import time
join()

def run(mode, differing):
    options = dict(rank=3, density=0.2)
    model = build()
    convert = pack_gradients if mode == "packed" else lift_param_groups
    groups = convert(model, freeze_rest=True, **(options if mode == "packed" else {}))
    parallel = DistributedDataParallel(model)
    optimizer = LiftAdamW(groups, lr=3e-3, refresh_interval=2, refresh_drift=0.1, **options)
    reports, said, start = [], "", time.monotonic()
    for step in range(10):
        backward(parallel, step)
        if rank == 1 and differing and step == 1:
            for ref in optimizer._table.refs:
                ref.drift["drift_rate"].fill_(1e6)  # This rank will think that its masks have drifted.
        try:
            optimizer.step()
        except RuntimeError as error:
            said = f"step {step}: {error}"
            break
        reports.append(str(optimizer.last_refresh))
        optimizer.zero_grad()
    return said, reports, time.monotonic() - start

cases = [(mode, differing) for mode in ("matrix", "packed") for differing in (False, True)]
torch.save({case: run(*case) for case in cases}, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each case said, and its reports, by rank."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(WORKER, 2, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["matrix", "packed"])
def test_ranks_agree_on_what_they_skip(found, mode):
    (said, reports, _), (other, others, _) = (ranks[mode, False] for ranks in found)
    assert said == other == "" and reports == others and len(reports) == 10
    assert any("skipped" in report for report in reports) and any("(overlap" in report for report in reports)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["matrix", "packed"])
def test_ranks_that_decide_otherwise_are_an_error_on_each_at_once(found, mode):
    for said, _, took in (ranks[mode, True] for ranks in found):
        assert said.startswith("step 2: ranks 0 and 1 would train different entries of ")
        assert took < 50  # not after the patience with a rank that shows nothing
