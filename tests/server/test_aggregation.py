"""The mean of a round's updates, by participants and by contributors."""

from __future__ import annotations

import numpy as np
import torch

from clients.messages import fields_of, named_arrays
from clients.wire import decode
from fedrec.data.split import Split
from server.aggregation import RoundSum, add_replies, mean_update
from tests.conftest import WorkspaceFactory
from tests.server.federations import FEDMF, FaultyGrid, federate_over


def test_a_hand_made_mean(workspace: WorkspaceFactory) -> None:
    """Four devices; two touched item 0, one item 1, none item 2; each decayed all rows by a tenth."""
    algorithm = workspace({**FEDMF, "dim": 1}).algorithm
    sums = torch.zeros(120, 1)
    sums[0], sums[1] = 3.0, 2.0
    counts = np.zeros(120, dtype=np.int64)
    counts[0], counts[1] = 2, 1
    shared = {"item": torch.full((120, 1), 5.0)}
    total = RoundSum({"item": sums}, {"item": -0.4}, counts, devices=4)
    participants = mean_update(total, algorithm, shared, "participants")["item"]
    contributors = mean_update(total, algorithm, shared, "contributors")["item"]
    torch.testing.assert_close(participants[:3, 0], torch.tensor([0.75 - 0.5, 0.5 - 0.5, -0.5]))
    torch.testing.assert_close(contributors[:3, 0], torch.tensor([1.5 - 0.5, 2.0 - 0.5, -0.5]))


def test_contributors_are_the_devices_that_touched_an_item(workspace: WorkspaceFactory, few_users: Split) -> None:
    """From the arrays that 16 single devices sent, item by item."""
    grid = FaultyGrid(16)
    algorithm = {**FEDMF, "item_weight_decay": 0.0, "negatives": 1, "max_positives": 2}
    space = workspace(algorithm, 16, few_users, aggregation_counts=True)
    outcome = federate_over(grid, space, 1, mean="contributors")
    collected: list[list[np.ndarray]] = [[] for _ in range(few_users.n_items)]
    for _, reply in grid.replies:
        if reply.metadata.message_type == "train":
            arrays = named_arrays(reply.content.array_records["update"])
            for row, value in zip(arrays["item/rows"], arrays["item/values"], strict=True):
                collected[row].append(value)
    assert 0 < sum(not values for values in collected) < few_users.n_items
    start = space.algorithm.initial_shared()["item"].numpy()
    expected = np.stack([s + (np.mean(v, axis=0) if v else 0.0) for s, v in zip(start, collected, strict=True)])
    np.testing.assert_allclose(outcome.final_shared["item"].numpy(), expected, atol=1e-6)


def test_the_sum_does_not_depend_on_who_answered_first(workspace: WorkspaceFactory) -> None:
    grid = FaultyGrid(7)
    space = workspace(FEDMF, 7)
    federate_over(grid, space, 2)
    replies = [m for _, m in grid.replies if m.metadata.message_type == "train"][-7:]
    nodes = {m.metadata.src_node_id: node for node, m in grid.replies}
    orders = [replies, replies[::-1], [replies[k] for k in (3, 0, 6, 1, 5, 2, 4)]]
    first, *others = (add_replies(space.algorithm, order, nodes) for order in orders)
    # These numbers are such that the order matters: summed as they came, the orders differ.
    naive = []
    for order in orders:
        total = np.zeros((120, 8), dtype=np.float32)
        for message in order:
            arrays = fields_of(named_arrays(message.content.array_records["update"]), "item")
            arrays.pop("decay")
            total += decode(arrays, (120, 8))
        naive.append(total)
    assert not np.array_equal(naive[0], naive[2])
    for other in others:
        assert torch.equal(first.sums["item"], other.sums["item"])
        assert (first.loss, first.decay, first.devices) == (other.loss, other.decay, other.devices)
