"""What a step of the search does besides the model: losses against autograd, an optimiser against torch's."""

import math

import pytest
import torch
from rome_fast.kernels import operators

from helpers import relative_error

F32, F64 = torch.float32, torch.float64
KL, SCALE = 0.0625, 8.0
MOST, MARGIN, MOVED_BY = 9, 2, 6
TINY = 1e-20


def losses_case(targets, essences, size, dtype, seed=0):
    """Arguments of the op: rows whose target is the most probable token or is not, essences known and unknown."""
    torch.manual_seed(seed)
    logits = 3 * torch.randn(targets + essences, size)
    label = torch.randint(size, (targets,))
    label[::2] = logits[:targets:2].argmax(1)
    share = torch.rand(targets)
    share[2::3] = 0
    before = torch.randn(essences, size).log_softmax(1)
    unknown = torch.arange(essences) % 2 == 1
    return [before.to(dtype), unknown, logits.to(dtype), label, share.to(dtype)]


def losses_oracle(before, unknown, logits, label, share):
    """Values, which targets lead, gradient and the log-probabilities that are kept, in float64 by autograd."""
    logits = logits.double().clone().requires_grad_()
    log_p, count = logits.log_softmax(1), len(label)
    kept = torch.where(unknown[:, None], log_p[count:].detach(), before.double())
    nll = -log_p[torch.arange(count), label] * share
    divergence = KL * torch.nn.functional.kl_div(kept, log_p[count:], reduction="none", log_target=True).sum(1)
    values = torch.cat([nll, divergence])
    (gradient,) = torch.autograd.grad(SCALE * values.sum(), logits)
    leads = [float(share[i] == 0 or logits[i].argmax() == label[i]) for i in range(count)]
    return values.detach(), torch.tensor(leads), gradient, kept


def check_losses(sizes, dtype):
    arguments = losses_case(*sizes, dtype)
    wanted = losses_oracle(*arguments)
    values, right, gradient = operators.target_losses_(*arguments, KL, SCALE, True)
    before, unknown, logits, *_ = arguments
    assert not unknown.any()
    assert right.tolist() == wanted[1].tolist()
    # A logarithm of a sum of `size` terms, added up in parts of at most 64, and a few operations; probabilities have an
    # error as large as log p's own, which is up to 25 here.
    eps = torch.finfo(dtype).eps
    for got, exact in ((values, wanted[0]), (gradient, wanted[2]), (before, wanted[3])):
        assert relative_error(got, exact) <= (64 + 25) * eps
    again = operators.target_losses_(before, unknown, logits, *arguments[3:], KL, SCALE, False)
    assert again[2].numel() == 0
    count = sizes[0]
    assert torch.equal(again[0][:count], values[:count])


SIZES = [(5, 2, 300), (1, 1, 1), (4, 3, 4500), (3, 0, 17), (0, 2, 33)]


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("sizes", SIZES)
def test_target_losses(sizes, dtype):
    check_losses(sizes, dtype)


def check_faults():
    """A row that is no number shows, and the others are what they are without it; of equal logits the first leads."""
    arguments = losses_case(4, 3, 40, F32)
    fresh = [x.clone() for x in arguments]
    logits = arguments[2]
    logits[1, 3] = logits[5, 7] = math.nan
    logits[6, 9] = math.inf
    values, right, gradient = operators.target_losses_(*arguments, KL, SCALE, True)
    wanted = operators.target_losses_(*fresh, KL, SCALE, True)
    bad = [1, 5, 6]
    good = [0, 2, 3, 4]
    assert not values[bad].isfinite().any()
    for got, exact in ((values, wanted[0]), (gradient, wanted[2])):
        assert torch.equal(got[good], exact[good])
    assert right[[0, 2, 3]].tolist() == wanted[1][[0, 2, 3]].tolist()
    equal = torch.zeros(2, 40)
    none = torch.empty(0, 40), torch.empty(0, dtype=torch.bool)
    _, right, _ = operators.target_losses_(*none, equal, torch.tensor([0, 1]), torch.ones(2), KL, SCALE, False)
    assert right.tolist() == [1, 0]


def test_a_row_that_is_no_number_spoils_itself_alone():
    check_faults()


class Edits:
    """The state of some edits, in each of the situations that the ops tell apart."""

    def __init__(self, count, d, dtype=F32):
        torch.manual_seed(1)
        self.delta, self.first = torch.randn(2, count, d, dtype=dtype)
        self.second = torch.rand(count, d, dtype=dtype)
        self.steps = torch.arange(count, dtype=F64).remainder(3).unsqueeze(1)
        self.decay, self.norms = torch.rand(2, count, dtype=dtype)
        self.delta[1] = 0
        self.losses = torch.rand(count, MOST + 1, dtype=dtype)
        self.led = torch.rand(count, dtype=dtype)
        self.evaluations = torch.arange(count).remainder(MOST)
        self.held = torch.arange(count).remainder(MARGIN + 2)
        self.done = torch.arange(count) % 7 == 6
        self.judged = torch.arange(count) % 5 == 4

    def copy(self):
        other = object.__new__(Edits)
        vars(other).update({name: x.clone() for name, x in vars(self).items()})
        return other


def judged_by(run, state, edits, stop_loss):
    """The state and which edits have ended, by an implementation of `stop_rule_`."""
    state, n = state.copy(), len(edits)
    torch.manual_seed(2)
    loss, share = torch.rand(n, dtype=state.delta.dtype), (torch.arange(n) % 3 > 0).to(state.delta.dtype)
    loss[-1] = math.nan
    ended = torch.zeros(n, dtype=torch.bool)
    names = ("decay", "steps", "losses", "led", "evaluations", "held", "done", "judged", "delta")
    run(
        ended,
        *(getattr(state, name) for name in names),
        edits,
        loss,
        share,
        stop_loss,
        MOST,
        MARGIN,
        MOVED_BY,
    )
    return state, ended


def moved_by(run, state, edits, learning_rate=0.5, clamp=4.0):
    """The state after an implementation of `clamped_adam_`."""
    state = state.copy()
    torch.manual_seed(3)
    names = ("delta", "first", "second", "steps", "judged", "done", "decay", "norms")
    gradient = torch.randn(len(edits), state.delta.shape[1], dtype=state.delta.dtype)
    run(*(getattr(state, name) for name in names), edits, gradient, learning_rate, clamp, TINY)
    return state, gradient


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_clamped_adam_is_that_of_torch(dtype):
    """Each edit by itself; the others stay as they are to the bit."""
    state, clamp = Edits(60, 33, dtype), 15.0
    state.judged = torch.arange(60) % 5 < 4
    edits = torch.randperm(60)[:45]
    got, gradient = moved_by(operators.clamped_adam_, state, edits, clamp=clamp)
    turns = {int(edit) for edit in edits if state.judged[edit] and not state.done[edit]}
    assert 0 < len(turns) < 45
    clamped = 0
    for edit in range(60):
        if edit not in turns:
            for name in ("delta", "first", "second", "steps"):
                assert torch.equal(getattr(got, name)[edit], getattr(state, name)[edit])
            continue
        x, step = state.delta[edit].double().requires_grad_(), float(state.steps[edit])
        adam = torch.optim.Adam([x], 0.5)
        if step:
            moments = {"exp_avg": state.first[edit].double(), "exp_avg_sq": state.second[edit].double()}
            adam.state[x] = {"step": torch.tensor(step), **moments}
        own = gradient[list(edits).index(edit)].double()
        x.grad = own + (state.decay[edit] * x.detach() / x.detach().norm() if x.any() else 0)
        adam.step()
        limit = clamp * float(state.norms[edit])
        length = float(x.detach().norm())
        clamped += length > limit
        wanted = x.detach() * min(1.0, limit / length)
        # Ten operations on each number, of which a difference of the old δ and the step loses the most.
        assert (got.delta[edit] - wanted).abs().max() <= 20 * torch.finfo(dtype).eps * float(wanted.abs().max())
        assert float(got.steps[edit]) == step + 1
    assert 0 < clamped < len(turns)
    assert torch.equal(got.judged[edits], state.judged[edits] & state.done[edits])


@pytest.mark.parametrize("stop_loss", [None, 0.6])
def test_the_stop_rule_edit_by_edit(stop_loss):
    """As it would be said in Python."""
    state = Edits(35, 8, F64)
    edits = torch.randperm(35)[:30]
    got, ended = judged_by(operators.stop_rule_, state, edits, stop_loss)
    torch.manual_seed(2)
    losses = torch.rand(30, dtype=F64).tolist()
    losses[-1] = math.nan
    dropped = 0
    for slot, edit in enumerate(edits.tolist()):
        over, leads = bool(state.done[edit]), slot % 3 > 0
        assert bool(got.judged[edit])
        if over or state.judged[edit]:
            assert bool(ended[slot]) == bool(got.done[edit]) == over
            assert int(got.evaluations[edit]) == int(state.evaluations[edit])
            assert float(got.decay[edit]) == float(state.decay[edit])
            continue
        loss = losses[slot] + float(state.decay[edit] * state.delta[edit].norm())
        count = int(state.evaluations[edit]) + 1
        held = int(state.held[edit]) + 1 if leads else 0
        met = held > MARGIN if stop_loss is None else loss < stop_loss
        over = met or not math.isfinite(loss) or count >= MOST
        assert (int(got.evaluations[edit]), int(got.held[edit]), bool(ended[slot])) == (count, held, over)
        assert float(got.losses[edit, count - 1]) == pytest.approx(loss, nan_ok=True)
        assert float(got.led[edit]) == leads
        first = loss if count == 1 else float(state.losses[edit, 0])
        stuck = stop_loss is None and not over and count == MOVED_BY and loss >= first
        dropped += stuck
        assert float(got.decay[edit]) == (0 if stuck else float(state.decay[edit]))
        assert float(got.steps[edit]) == (0 if stuck else float(state.steps[edit]))
    assert (dropped > 0) == (stop_loss is None)
