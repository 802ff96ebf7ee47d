import pytest
import torch

from peft_moice.routing.router import MoICERouter, balance_loss, select_experts
from peft_moice.routing.spec import RouterSpec


def make_router(scope: str = "layer", identity: bool = False) -> MoICERouter:
    spec = RouterSpec([1e4, 2e4, 3e4], 2, 5, scope, "silu", identity)
    router = MoICERouter.from_spec(spec, None, num_heads=4, head_dim=8)
    torch.manual_seed(0)
    router.reset_parameters(init_weights=False)
    return router


@pytest.mark.parametrize("top_k", [1, 2, 3, 5])
def test_gates_are_a_softmax_over_the_largest_logits(top_k):
    logits = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    gates = select_experts(logits, top_k)
    largest = logits.topk(top_k, dim=-1)
    expected = torch.zeros_like(logits).scatter(-1, largest.indices, largest.values.softmax(dim=-1))
    torch.testing.assert_close(gates, expected)
    assert ((gates > 0).sum(dim=-1) == top_k).all()


def test_gates_are_float32_for_half_precision_logits():
    assert select_experts(torch.randn(1, 2, 3, 4).bfloat16(), 2).dtype == torch.float32


def test_router_per_head_uses_each_heads_own_weights():
    router = make_router("head")
    query = torch.randn(2, 4, 6, 8)
    for head in range(4):
        gate, up, down = (weight[head] for weight in (router.gate_proj, router.up_proj, router.down_proj))
        q = query[:, head]
        expected = (torch.nn.functional.silu(q @ gate.T) * (q @ up.T)) @ down.T
        torch.testing.assert_close(router(query)[:, head], expected)


def test_identity_scale_moves_from_the_own_angle_to_the_mixture():
    router = make_router(identity=True)
    logits = router(torch.randn(2, 4, 6, 8))
    mixture = select_experts(logits, 2)
    own = torch.zeros(3)
    own[0] = 1
    router.identity_scale.data = torch.tensor([0.0, 1.0, 0.5, 0.0])
    gates, learns = router.gates(logits, 2), router.picks(logits, 2)
    assert torch.equal(learns, (mixture != 0) | (own != 0))
    assert torch.equal(gates[:, 0], own.expand_as(gates[:, 0]))
    torch.testing.assert_close(gates[:, 1], mixture[:, 1])
    torch.testing.assert_close(gates[:, 2], (own + mixture[:, 2]) / 2)


class TestBalanceLoss:
    def logits(self, seed: int = 0) -> torch.Tensor:
        return torch.randn(2, 3, 7, 5, generator=torch.Generator().manual_seed(seed))

    def test_is_constant_without_gradient_if_all_experts_are_kept(self):
        logits = self.logits().requires_grad_()
        loss = balance_loss([logits], 5)
        loss.backward()
        torch.testing.assert_close(loss, torch.tensor(5.0))
        assert logits.grad.abs().max() < 1e-6

    def test_definition_over_layers(self):
        """`N Σ_k Σ_i f_ki P_i` with one f per pick, as the method states it, against the summed form in the code."""
        layers, top_k = [self.logits(0), self.logits(1)], 2
        rows = torch.cat([layer.reshape(-1, 5) for layer in layers])
        probs = rows.softmax(dim=-1)
        picks = torch.nn.functional.one_hot(probs.topk(top_k, dim=-1).indices, 5).float()  # [rows, K, N]
        expected = 5 * (picks.mean(dim=0) * probs.mean(dim=0)).sum()
        torch.testing.assert_close(balance_loss(layers, top_k), expected)

    def test_masked_tokens_do_not_count(self):
        logits = self.logits()
        mask = torch.ones(2, 7)
        mask[0, :3] = 0
        padded = logits.clone()
        padded[0, :, :3] = 100 * torch.randn(3, 3, 5)
        assert torch.equal(balance_loss([logits], 2, mask), balance_loss([padded], 2, mask))
        kept = torch.cat([logits[0, :, 3:].reshape(-1, 5), logits[1].reshape(-1, 5)])[None, None]
        torch.testing.assert_close(balance_loss([logits], 2, mask), balance_loss([kept], 2))

    def test_a_batch_of_padding_only_is_finite(self):
        assert balance_loss([self.logits()], 2, torch.zeros(2, 7)).isfinite()
