"""The parts of G beside the network: trace, base and scale, each against a plain form of its own in float64."""

import copy

import pytest
import torch

import lodo
from tests.helpers.bases import dense_basis, factors_in, of_sides
from tests.helpers.oracle import learned, matvec
from tests.helpers.parts import (
    NETWORKS,
    SHAPES,
    backward,
    built,
    flat,
    loss_of,
    made,
    rotated_back,
    scales,
    state_of,
    trained,
)

BASES = (None, "adam", "soap")
WARM = 12


def dense_adam(entry, beta2=0.999):
    (steps,) = entry["step"].unique().tolist()
    return 1 / ((entry["exp_avg_sq"] / (1 - beta2**steps)).sqrt() + 1e-8)


def dense_of(product, size):
    return torch.stack([product(column) for column in torch.eye(size, dtype=torch.float64)], 1)


# ---- Adam ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("order", [1, -1])
def test_an_identity_over_adam_is_adam(decay, order):
    """Parameters without a gradient are left alone, and count steps of their own."""
    shapes = SHAPES[::order]
    ours, theirs = made(shapes), made(shapes)
    optimizer = lodo.LODO(ours, lr=0.05, meta_lr=0.7, base="adam", preconditioner="identity", weight_decay=decay)
    reference = torch.optim.AdamW(theirs, lr=0.05, weight_decay=decay)
    for step in range(50):
        backward(ours), backward(theirs)
        absent = step % 5 if step % 3 == 0 else None
        if absent is not None:
            ours[absent].grad = theirs[absent].grad = None
        optimizer.step(), reference.step()
        torch.testing.assert_close(flat(ours), flat(theirs), rtol=0, atol=1e-11)
    assert (flat(ours) - flat(made(shapes))).abs().max() > 0.5
    counts = [int(optimizer.state[p]["step"]) for p in ours]
    assert counts == [int(reference.state[p]["step"]) for p in theirs]
    assert len(set(counts)) > 1


# ---- G as a matrix -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_lr", [0.0, 0.05])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", NETWORKS)
def test_g_is_the_product_of_its_parts(kind, base, scale_lr, kernel):
    params, optimizer = trained(kind, base=base, scale_lr=scale_lr, meta_lr=0.02)
    operator, entry, n = optimizer.preconditioners[0], state_of(optimizer), sum(p.numel() for p in params)
    if base is None and not scale_lr:
        assert isinstance(operator, lodo.preconditioners.BY_NAME[kind])
        return
    lengths = torch.tensor([p.numel() for p in params])
    s = entry["scale"][0].repeat_interleave(lengths) if scale_lr else torch.zeros(n, dtype=torch.float64)
    assert not scale_lr or entry["scale"][0].unique().numel() == len(SHAPES)
    d = torch.ones(n, dtype=torch.float64) if base is None else dense_adam(entry)
    q = torch.eye(n, dtype=torch.float64)
    if base == "soap":
        q = dense_basis(SHAPES, factors_in(entry, of_sides()))
    t = d.sqrt().diag() @ q.T @ (s / 2).exp().diag()
    expected, found = t.T @ operator.network.to_dense() @ t, operator.to_dense()
    size = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * size)
    torch.testing.assert_close(found, found.T, rtol=0, atol=1e-12 * size)
    assert torch.linalg.eigvalsh(found).min() > 0
    v = torch.randn(2 * n, dtype=torch.float64)[::2]
    torch.testing.assert_close(operator.matvec(v), expected @ v, rtol=0, atol=1e-11 * size)
    with pytest.raises(ValueError, match=rf"v must have shape \({n},\)"):
        operator.matvec(v[1:])


@pytest.mark.parametrize("scale_lr", [0.0, 0.05])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", NETWORKS)
def test_g_acts_in_rotated_coordinates(kind, base, scale_lr, kernel):
    """In these T is diagonal; `matvec` takes a vector there and back. A diagonal network or none is no special case."""
    params, optimizer = trained(kind, base=base, scale_lr=scale_lr, meta_lr=0.02)
    operator, entry, n = optimizer.preconditioners[0], state_of(optimizer), sum(p.numel() for p in params)
    network, root, q = getattr(operator, "network", operator), scales(params, optimizer).sqrt(), torch.eye(n).double()
    if base is not None:
        root = root * dense_adam(entry).sqrt()
    if base == "soap":
        q = dense_basis(SHAPES, factors_in(entry, of_sides()))
        assert (q - torch.eye(n)).abs().max() > 0.1
    v = torch.randn(n, dtype=torch.float64)
    kept = v.clone()
    product = root * v if kind == "identity" else matvec(network, learned(network), root * v)
    found, expected = operator.apply(v), root * product
    size = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * size)
    assert found.data_ptr() != v.data_ptr()
    torch.testing.assert_close(operator.rotate(v), q.T @ v, rtol=0, atol=1e-12)
    torch.testing.assert_close(operator.rotate_back_(v.clone()), q @ v, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        operator.rotate(operator.matvec(operator.rotate_back_(v.clone()))), found, rtol=0, atol=1e-12 * size
    )
    assert torch.equal(v, kept)


@pytest.mark.parametrize("momentum_decays", [None, (0.0, 0.9, 0.99)])
@pytest.mark.parametrize("kind", ["identity", "log_diagonal", "block_permutation"])
def test_what_is_kept_is_turned_with_the_basis(kind, momentum_decays, kernel, monkeypatch):
    """Turned back it is what plain averages of the gradients are, through four changes of the basis."""
    monkeypatch.setattr("lodo.parts.bases.TOLERANCE", 0.0)
    monkeypatch.setattr("lodo.parts.mixture.LONG", float("inf"))  # none is forgotten
    options = {"trace_decay": 0.7, "mix_lr": 0.02, "scale_lr": 0.01, "meta_lr": 0.02}
    params, optimizer = built(kind, base="soap", momentum_decays=momentum_decays, **options)
    n, lengths = sum(p.numel() for p in params), [p.numel() for p in params]
    each = torch.tensor(momentum_decays or (0.9,), dtype=torch.float64)[:, None]
    momenta, e, bases = torch.zeros(len(each), n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64), []
    for t in range(1, 36):
        gradient = backward(params)
        optimizer.step()
        entry = state_of(optimizer)
        momenta = each * momenta + (1 - each) * gradient
        m = momenta[0]
        if momentum_decays:
            w = entry["mixture"][0].softmax(0).repeat_interleave(torch.tensor(lengths), dim=1)
            m = (w * momenta / (1 - each**t)).sum(0)
            torch.testing.assert_close(rotated_back(optimizer, entry["momenta"]), momenta, rtol=0, atol=1e-12)
        e = 0.7 * e + m
        momentum = flat(optimizer.state[p]["momentum"] for p in params)
        torch.testing.assert_close(rotated_back(optimizer, momentum), m, rtol=0, atol=1e-12)
        torch.testing.assert_close(rotated_back(optimizer, entry["momentum_trace"]), e, rtol=0, atol=1e-12)
        if not bases or not torch.equal(bases[-1], entry["eigenbasis"][:9]):  # of the first tensor's rows
            bases.append(entry["eigenbasis"][:9])
    assert len(bases) == 4
    assert min(float((old - new).abs().max()) for old, new in zip(bases[1:], bases, strict=False)) > 1e-3


# ---- what the network learns ---------------------------------------------------------------------------------------


def whitening(params, optimizer):
    """T, as a matrix; the rotation is one, see above."""
    operator, entry = optimizer.preconditioners[0], state_of(optimizer)
    squares = scales(params, optimizer) * (dense_adam(entry) if "exp_avg_sq" in entry else 1)
    return squares.sqrt().diag() @ dense_of(operator.rotate, operator.size)


@pytest.mark.parametrize("trace_decay", [0.0, 0.7])
@pytest.mark.parametrize("scale_lr", [0.0, 0.05])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", [kind for kind in NETWORKS if kind != "identity"])
def test_the_network_learns_by_the_gradient_of_autograd(kind, base, scale_lr, trace_decay, kernel):
    """That of the loss with theta free in the steps that led here, those before the last counted by their age, and what
    they did to a tensor divided by its scale."""
    settings = {"trace_decay": trace_decay, "base": base, "scale_lr": scale_lr, "beta": 0.6, "meta_optimizer": "sgd"}
    params, optimizer = built(kind, meta_lr=0.02, **{**settings, "lr": 0.0})
    m = e = torch.zeros(sum(p.numel() for p in params), dtype=torch.float64)
    for _ in range(WARM):  # until there have been gradients along all coordinates, which SOAP's first bases make zero
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        m = 0.6 * m + 0.4 * flat(p.grad for p in params)
        e = trace_decay * e + m
    optimizer.param_groups[0]["lr"] = 0.05
    for t in range(WARM, WARM + 8):
        g = optimizer.preconditioners[0]
        network = getattr(g, "network", g)
        coordinates = whitening(params, optimizer)
        theta = learned(network).requires_grad_()
        lr = 0.0 if t == WARM else 0.05 if base is None else 0.05 / (1 - 0.6**t)
        step = lr * coordinates.T @ matvec(network, theta, coordinates @ e)
        x, gradient = flat(params), backward(params)
        optimizer.step()
        loss_of(x + (step.detach() - step) / scales(params, optimizer)).backward()
        error = torch.linalg.vector_norm(learned(network) - (theta - 0.02 * theta.grad).detach())
        assert error <= 1e-9 * 0.02 * torch.linalg.vector_norm(theta.grad)
        m = 0.6 * m + 0.4 * gradient
        e = trace_decay * e + m
    if trace_decay:
        torch.testing.assert_close(
            rotated_back(optimizer, state_of(optimizer)["momentum_trace"]), e, rtol=1e-12, atol=1e-13
        )
    momentum = flat(optimizer.state[p]["momentum"] for p in params)
    torch.testing.assert_close(rotated_back(optimizer, momentum), m, rtol=1e-12, atol=1e-13)


def test_without_a_trace_the_state_has_none_and_one_that_is_switched_off_is_the_paper():
    params, optimizer = trained("block_permutation")
    others, other = trained("block_permutation", trace_decay=0.9, steps=0)
    other.param_groups[0]["trace_decay"] = 0.0
    for _ in range(12):
        backward(others)
        other.step()
    assert "momentum_trace" not in state_of(optimizer)
    assert torch.equal(flat(params), flat(others))


# ---- what the scales learn -----------------------------------------------------------------------------------------

TENSORS = ((3, 4), (5,), (), (2, 3))


def with_scales(params, optimizer, log_scales):
    """Sets the scales before the first step, as a load does; `step` with lr = 0 makes state and changes nothing."""
    lr, optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"], 0.0
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = lr
    saved = copy.deepcopy(optimizer.state_dict())
    for place, log_scale in enumerate(log_scales):
        saved["state"][place]["scale"][0] = log_scale
        saved["state"][place]["scheduled_lr"].fill_(lr)  # for a rise of lr takes back what scales have made up for
    optimizer.load_state_dict(saved)


def observed(before, table):
    """The hypergradient that a step has taken into the first moment."""
    return (table[1] - 0.9 * before[1]) / (1 - 0.9)


@pytest.mark.parametrize("scale_trace_decay", [0.0, 0.8, 1 - 1e-15])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", ["identity", "log_diagonal"])
def test_the_hypergradient_of_a_scale_is_that_of_autograd(kind, base, scale_trace_decay):
    """Of the loss where the steps have led that all used exp(s_j), each counted by its age."""
    options = {"base": base, "scale_lr": 1e-300, "scale_trace_decay": scale_trace_decay, "meta_lr": 0.02}
    params, optimizer = built(kind, TENSORS, **options)
    lengths = torch.tensor([p.numel() for p in params])
    s = torch.tensor([0.3, -0.5, 0.1, -0.2], dtype=torch.float64)
    with_scales(params, optimizer, s)
    steps = []
    for _ in range(8):
        free = s.clone().requires_grad_()
        factor = torch.exp(free - s).repeat_interleave(lengths)
        x = flat(params)
        for age, step in enumerate(reversed(steps)):
            x = x - scale_trace_decay**age * (factor - 1) * step
        g = backward(params)
        before = flat(params), state_of(optimizer)["scale"].clone()
        optimizer.step()
        h = observed(before[1], state_of(optimizer)["scale"])
        if steps:
            loss_of(x).backward()
            torch.testing.assert_close(h, free.grad, rtol=1e-9, atol=1e-12)
            assert (h.abs() > 1e-5).all()
        else:
            assert not h.any()
        steps.append(before[0] - flat(params))
        assert torch.equal(state_of(optimizer)["scale"][0], s)
        assert len(g) == sum(lengths)


@pytest.mark.parametrize("base", BASES)
def test_no_step_in_the_trace_counts_as_more_than_twenty_times_the_present_one(base):
    """Here as lr falls by a schedule, but for a step of no length."""
    settings = {"base": base, "scale_lr": 0.1, "scale_trace_decay": 0.9}
    params, optimizer = built("log_diagonal", TENSORS, **settings)
    lengths = torch.tensor([p.numel() for p in params])
    expected, peak = torch.zeros(24, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    shares = []
    for step in range(40):
        optimizer.param_groups[0]["lr"] = lr = 0.05 * 0.5 ** min(step, 9) if step != 20 else 0.0
        backward(params)
        before = flat(params)
        optimizer.step()
        length = lr * state_of(optimizer)["scale"][0].exp()
        peak = torch.maximum(peak, length)
        share = torch.where(length > 0, (20 * length / peak).clamp(max=1), 1.0)
        peak = peak * share
        expected = 0.9 * expected * share.repeat_interleave(lengths) + before - flat(params)
        torch.testing.assert_close(state_of(optimizer)["step_trace"], expected, rtol=0, atol=1e-13)
        shares.append(share)
    shares = torch.stack(shares)
    assert (shares[:3] == 1).all()
    assert (shares[6:10] < 0.9).all()
    assert (shares[20] == 1).all()


@pytest.mark.parametrize("base", BASES)
def test_the_scales_of_a_network_that_mixes_tensors_have_the_right_sum(base):
    """The sum of the hypergradients is the derivative with respect to the lr, here of one step."""
    params, optimizer = built("block_permutation", TENSORS, base=base, scale_lr=1e-300, scale_trace_decay=0.0)
    lengths = torch.tensor([p.numel() for p in params])
    table, expected = torch.zeros(3, len(TENSORS), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for t in range(1, 8):
        start = flat(params)
        backward(params)
        optimizer.step()
        h = observed(table, state_of(optimizer)["scale"])
        torch.testing.assert_close(h.sum(), expected, rtol=1e-6, atol=1e-12)
        assert bool(h.any()) == (t > 1)
        table = state_of(optimizer)["scale"].clone()
        s = torch.zeros(len(TENSORS), dtype=torch.float64, requires_grad=True)
        root = torch.exp(s / 2).repeat_interleave(lengths)
        m = rotated_back(optimizer, flat(optimizer.state[p]["momentum"] for p in params))
        lr = 0.05 if base is None else 0.05 / (1 - 0.9**t)
        landed = start - lr * root * (optimizer.preconditioners[0].to_dense() @ (root * m))
        torch.testing.assert_close(landed.detach(), flat(params), rtol=0, atol=1e-7 if base == "soap" else 1e-12)
        loss_of(landed).backward()
        expected = s.grad.sum()


def test_the_scales_move_as_adam_does_at_a_rate_that_falls(monkeypatch):
    """min(scale_lr, 5 / t), but for what the last steps tell."""
    monkeypatch.setattr("lodo.parts.tensor_scale.CLEAR", 2.0)
    monkeypatch.setattr("lodo.parts.tensor_scale.SURE", 3.0)
    monkeypatch.setattr("lodo.parts.tensor_scale.BRAKE", 0.0)
    params, optimizer = built("log_diagonal", TENSORS, base="adam", scale_lr=0.2)
    s = torch.zeros(4, dtype=torch.float64)
    m, v = s.clone(), s.clone()
    for t in range(1, 60):
        moves = state_of(optimizer)["step_trace"].clone() if t > 1 else torch.zeros(24, dtype=torch.float64)
        g = backward(params)
        optimizer.step()
        parts = zip(g.split([p.numel() for p in params]), moves.split([p.numel() for p in params]), strict=True)
        h = torch.stack([-(part * move).sum() for part, move in parts])
        m, v = 0.9 * m + 0.1 * h, 0.995 * v + 0.005 * h**2
        if t > 1:
            s = s - min(0.2, 5 / t) * (m / (1 - 0.9**t)) / (v / (1 - 0.995**t)).sqrt()
        torch.testing.assert_close(state_of(optimizer)["scale"][0], s, rtol=1e-9, atol=1e-12)
    assert s.abs().max() > 0.5


@pytest.mark.parametrize("options", [{}, {"max_step_norm": 1e-3}, {"maximize": True}], ids=str)
@pytest.mark.parametrize("base", BASES)
def test_the_trace_of_the_moves_is_what_was_subtracted(base, options):
    """Shortened steps count as short, parameters without a gradient have not moved. Weight decay is of the scales."""
    settings = {"base": base, "scale_lr": 0.01, "scale_trace_decay": 0.9, "weight_decay": 0.1, **options}
    params, optimizer = built("block_permutation", TENSORS, **settings)
    expected = torch.zeros(24, dtype=torch.float64)
    for step in range(10):
        backward(params)
        absent = step % 4 if step % 2 else None
        if absent is not None:
            params[absent].grad = None
        before = flat(params)
        optimizer.step()
        decay = 0.05 * 0.1 * scales(params, optimizer) * before
        if absent is not None:
            assert torch.equal(*(x.split([12, 5, 1, 6])[absent] for x in (before, flat(params))))
            decay.split([12, 5, 1, 6])[absent].zero_()
        made_step = before - flat(params)
        if "max_step_norm" in options:
            own = torch.linalg.vector_norm(made_step - decay)
            assert own <= 1e-3 * torch.linalg.vector_norm(before) * (1 + 1e-9)
        expected = 0.9 * expected + made_step
        torch.testing.assert_close(state_of(optimizer)["step_trace"], expected, rtol=0, atol=1e-13)
    assert expected.split([12, 5, 1, 6])[3].any()


@pytest.mark.parametrize("base", BASES)
def test_maximize_is_the_descent_of_the_negated_loss(base):
    settings = {"base": base, "scale_lr": 0.01, "trace_decay": 0.9}
    results = []
    for maximize in (False, True):
        params, optimizer = built("log_diagonal", TENSORS, maximize=maximize, **settings)
        for _ in range(12):
            backward(params)
            for p in params:
                p.grad.mul_(-1 if maximize else 1)
            optimizer.step()
        results.append((flat(params), state_of(optimizer)["scale"]))
    for descended, ascended in zip(*results, strict=True):
        assert torch.equal(descended, ascended)
