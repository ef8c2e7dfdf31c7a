"""Adam over the rows that have a gradient, against torch's Adam over whole tables."""

import pytest
import torch
from torch import nn

from train.row_adam import RowAdam


@pytest.mark.parametrize("beta2", [0.9, 0.999])
def test_it_is_adam_without_momentum(beta2):
    """On tables of which each step sees some rows, often or seldom, some of them twice, at a learning rate that changes."""
    torch.manual_seed(0)
    ours, theirs = nn.Embedding(50, 8, sparse=True), nn.Embedding(50, 8)
    theirs.load_state_dict(ours.state_dict())
    rows_adam = RowAdam([{"params": [ours.weight]}], beta2=beta2)
    adam = torch.optim.Adam([theirs.weight], betas=(0.0, beta2))
    weights = torch.randn(8)
    for step in range(200):
        ids = torch.cat([torch.randint(5, (6,)), torch.randint(50, (2,))])
        for table, optimizer in ((ours, rows_adam), (theirs, adam)):
            optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 200)
            (table(ids) * weights).sin().sum().backward()
            if table is ours:
                table.weight.grad = table.weight.grad.coalesce()
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-5, atol=1e-5)


def test_rows_without_a_gradient_stay():
    table = nn.Embedding(10, 4, sparse=True)
    before = table.weight.detach().clone()
    optimizer = RowAdam([{"params": [table.weight], "lr": 1.0}])
    for row in (3, 7):
        table(torch.tensor([row])).sum().backward()
        table.weight.grad = table.weight.grad.coalesce()
        optimizer.step()
        optimizer.zero_grad()
    assert (table.weight != before).any(dim=1).nonzero().flatten().tolist() == [3, 7]
