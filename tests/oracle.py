"""A naive textbook ROME in float64: what the package must reproduce, written without a line of the package.

Clarity comes before speed throughout: full forwards of the Hugging Face model, one row at a time (batch
size 1, so no padding and no mask), a forward hook on the down-projection to read keys or to add delta,
autograd and `torch.optim.Adam`, `torch.linalg.solve` with the explicit second moment. The model that is
passed in is copied to float64 on the CPU and never touched. Do not speed this file up and do not import
`rome_fast` here.

"float64" is as far as the Hugging Face modules go: rotary tables are computed in float32 whatever the dtype of
the model, and so are the attention scores of GPT-J. RMSNorm would be, forward and backward, which depends on the
order in which gradients are added up; `exact_norms` takes its place.

Notation: `W` (d, d_ff) and `b` (d,) are weight and bias of the down-projection in layer l, a key `k`
(d_ff,) is its input at one position. Every public function raises ValueError for input that it cannot take.
"""

import copy
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

METHODS = ("rome", "c-rome-released", "c-rome", "p-rome")


@dataclass
class OracleResult:
    """One edit: how it was found and the update of the weight. All tensors are float64 on the CPU."""

    delta: Tensor  # (d,) what is added to the down-projection's output at the subject's last token
    losses: list[float]  # one per iteration; the last one belongs to `delta`
    k_left: Tensor  # (d_ff,)
    k_den: Tensor  # (d_ff,)
    k_mean: Tensor  # (d_ff,) mean over the rows of the method
    k_unprefixed: Tensor  # (d_ff,)
    v0: Tensor  # (d,)
    residual: Tensor  # (d,)
    denominator: float  # k_left^T C^-1 k_den
    numerator_norm: float  # ||residual|| * ||C^-1 k_left||
    delta_w: Tensor  # (d, d_ff)


@dataclass
class Row:
    """One tokenised text: what goes into the model, where the subject ends and what has to be predicted."""

    input_ids: list[int]
    subject_position: int
    target_ids: list[int]  # empty for a row without a target
    target_logits_at: list[int]  # position of the logits that predict each target token


def rome(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    subject: str,
    target: str,
    *,
    layer: int,
    method: str,
    contexts: Sequence[str],
    second_moment: Tensor | None = None,  # (d_ff, d_ff); None is the identity
    steps: int = 20,
    lr: float = 0.5,
    weight_decay: float = 0.5,
    clamp: float = 4.0,
    kl_factor: float = 0.0625,
    stop_loss: float = 0.05,
    v0_norm: float | None = None,
    **text: str,
) -> OracleResult:
    """One ROME edit of one layer, by the textbook.

    `contexts` are the prefixed ones only, each ending in its joiner ("The weather is nice. "); the empty context is
    added here. c-rome leaves it out where it would put the subject's last token at position 0. `v0_norm` stands for
    ||v0|| in weight decay and clamp; `text` is the head and the separator of `make_row`.
    """
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}, wanted one of {METHODS}")
    if method == "c-rome" and not contexts:
        raise ValueError("contexts: got none, but c-rome needs prefixed rows")
    if steps < 1:
        raise ValueError(f"steps: got {steps}, wanted at least 1")

    model = double_copy(model)
    weight, bias = weight_and_bias(model, layer)

    unprefixed_row = make_row(tokenizer, "", prompt, subject, target, **text)
    prefixed_rows = [make_row(tokenizer, context, prompt, subject, target, **text) for context in contexts]
    kl_row = make_row(tokenizer, "", "{} is a", subject, None, **text)
    rows = [unprefixed_row, *prefixed_rows]
    if method == "c-rome" and unprefixed_row.subject_position == 0:
        rows = prefixed_rows  # in the other one, nothing at all precedes the subject's last token

    k_unprefixed = key_of(model, layer, unprefixed_row)
    k_mean = torch.stack([key_of(model, layer, row) for row in rows]).mean(dim=0)
    v0 = weight @ (k_mean if method == "c-rome" else k_unprefixed) + bias

    length = v0.norm().item() if v0_norm is None else v0_norm

    log_p_before = log_p_at_subject(model, layer, kl_row, torch.zeros_like(v0))
    delta = torch.zeros_like(v0, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=lr)
    losses: list[float] = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = value_loss(model, layer, rows, kl_row, log_p_before, delta, length, weight_decay, kl_factor)
        losses.append(loss.item())
        if loss.item() < stop_loss or step == steps - 1:
            break
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            largest = clamp * length
            if delta.norm() > largest:
                delta *= largest / delta.norm()
    delta = delta.detach()

    if method == "rome":
        k_left, k_den, residual = k_mean, k_unprefixed, delta
    elif method == "c-rome-released":
        k_left, k_den, residual = k_mean, k_mean, weight @ k_unprefixed + delta - weight @ k_mean
    elif method == "c-rome":
        k_left, k_den, residual = k_mean, k_mean, delta
    else:
        k_left, k_den, residual = k_unprefixed, k_unprefixed, delta

    u = torch.linalg.solve(moment_or_identity(second_moment, len(k_left)), k_left)
    denominator = u @ k_den
    return OracleResult(
        delta=delta,
        losses=losses,
        k_left=k_left,
        k_den=k_den,
        k_mean=k_mean,
        k_unprefixed=k_unprefixed,
        v0=v0,
        residual=residual,
        denominator=denominator.item(),
        numerator_norm=(residual.norm() * u.norm()).item(),
        delta_w=torch.outer(residual, u) / denominator,
    )


def joint(results: Sequence[OracleResult], second_moment: Tensor | None) -> Tensor:
    """R (U^T K_den)^-1 U^T with U = C^-1 K_left: (d, d_ff) float64, one update that satisfies all edits."""
    if not results:
        raise ValueError("results: got none, wanted at least one")
    k_left = torch.stack([result.k_left for result in results], dim=1)  # (d_ff, E)
    k_den = torch.stack([result.k_den for result in results], dim=1)  # (d_ff, E)
    residuals = torch.stack([result.residual for result in results], dim=1)  # (d, E)
    u = torch.linalg.solve(moment_or_identity(second_moment, len(k_left)), k_left)  # (d_ff, E)
    return residuals @ torch.linalg.solve(u.T @ k_den, u.T)


@dataclass
class DualResult:
    """An edit with two keys: the mean behind contexts, and the one of the prompt alone."""

    prefixed: OracleResult  # of c-rome, its keys the mean of the rows behind contexts
    unprefixed: OracleResult  # the same delta at the unprefixed key; of a first token, that of p-rome without contexts
    first_token: bool  # whether the subject's last token is the first of all
    delta_w: Tensor  # (d, d_ff)


def dual(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    subject: str,
    target: str,
    *,
    layer: int,
    contexts: Sequence[str],
    second_moment: Tensor | None,
    first_tokens: Tensor,  # (d_ff, d_ff) of `first_token_moment`
    weight: float,
    ridge: float,
    scale: float = 1.0,
    **settings: float,
) -> DualResult:
    """An edit that holds both keys; where the subject's last token is the first of all, the second with its own value.

    `scale` shortens the delta of that value.
    """

    def value(method: str, contexts: Sequence[str], v0_norm: float | None = None) -> OracleResult:
        return rome(
            model,
            tokenizer,
            prompt,
            subject,
            target,
            layer=layer,
            method=method,
            contexts=contexts,
            second_moment=second_moment,
            v0_norm=v0_norm,
            **settings,
        )

    one = value("c-rome", contexts)
    first = make_row(tokenizer, "", prompt, subject, target).subject_position == 0
    if first:
        # A first token's own value is of another size altogether.
        unprefixed = value("p-rome", [], one.v0.norm().item())
        prefixed, unprefixed = one, replace(unprefixed, residual=scale * unprefixed.delta)
    else:
        behind = ((len(contexts) + 1) * one.k_mean - one.k_unprefixed) / len(contexts)
        u = torch.linalg.solve(moment_or_identity(second_moment, len(behind)), behind)
        prefixed = replace(
            one,
            k_left=behind,
            k_den=behind,
            denominator=(u @ behind).item(),
            numerator_norm=(one.delta.norm() * u.norm()).item(),
        )
        unprefixed = replace(one, k_left=one.k_unprefixed, k_den=one.k_unprefixed)
    result = DualResult(prefixed, unprefixed, first, torch.empty(0))
    return replace(result, delta_w=dual_joint([result], second_moment, first_tokens, weight, ridge))


def dual_joint(
    results: Sequence[DualResult],
    second_moment: Tensor | None,
    first_tokens: Tensor,
    weight: float,
    ridge: float,
) -> Tensor:
    """R (U^T K + S)^-1 U^T over both keys of all edits: (d, d_ff) float64.

    U is C^-1 K, but (C + weight C1)^-1 K for the unprefixed keys of first tokens; S as in `shared_ridge`.
    """
    moment = moment_or_identity(second_moment, len(first_tokens))
    keys, us, residuals, first = [], [], [], []
    for result in results:
        held = moment + weight * first_tokens.double() if result.first_token else moment
        for one, matrix in ((result.prefixed, moment), (result.unprefixed, held)):
            keys.append(one.k_den)
            us.append(torch.linalg.solve(matrix, one.k_den))
            residuals.append(one.residual)
        first += [False, result.first_token]
    k, u, r = (torch.stack(columns, dim=1) for columns in (keys, us, residuals))
    gram = u.T @ k
    return r @ torch.linalg.solve(gram + shared_ridge(gram, first, ridge), u.T)


def shared_ridge(gram: Tensor, first: Sequence[bool], ridge: float) -> Tensor:
    """S = ridge * mean of the diagonal of U^T K, over the columns of first tokens and over the others."""
    diagonal = gram.diagonal().tolist()
    means = {
        kind: statistics.fmean(d for d, f in zip(diagonal, first, strict=True) if f == kind) for kind in set(first)
    }
    return torch.tensor([ridge * means[kind] for kind in first], dtype=gram.dtype).diag()


@dataclass
class Placed:
    """An edit whose values are known: what is to arrive in the last edit layer's output at the subject's last token."""

    bare: Row  # the prompt alone
    behind: list[Row]  # behind each context
    delta: Tensor  # (d,)
    bare_delta: Tensor | None = None  # (d,) of the prompt alone, where the subject is the first token


Updates = dict[int, Tensor]
"""Delta W (d, d_ff) by layer."""


def memit(
    model: PreTrainedModel,
    edits: Sequence[Placed],
    layers: Sequence[int],  # ascending
    moments: dict[int, Tensor] | None,  # C by layer
    penalty: float,
    earlier: dict[int, Tensor] | None = None,
    norm_penalty: float = 0.0,
) -> tuple[Updates, dict[int, Tensor]]:
    """R K^T (penalty C + norm_penalty I + K K^T)^-1 layer by layer; the updates, and K of every layer.

    `earlier` are the keys K_p of earlier batches, whose K_p K_p^T is added to what is inverted.
    """

    def update(layer: int, k: Tensor, r: Tensor) -> Tensor:
        matrix = penalty * moment_or_identity(None if moments is None else moments[layer], len(k)) + k @ k.T
        matrix = matrix + norm_penalty * torch.eye(len(k), dtype=torch.float64)
        if earlier is not None:
            matrix = matrix + earlier[layer] @ earlier[layer].T
        return torch.linalg.solve(matrix, k @ r.T).T

    return layer_by_layer(model, edits, layers, memit_columns, update)


def alphaedit(
    model: PreTrainedModel,
    edits: Sequence[Placed],
    layers: Sequence[int],
    moments: dict[int, Tensor],
    threshold: float,
    penalty: float,
    earlier: dict[int, Tensor] | None = None,
) -> tuple[Updates, dict[int, Tensor]]:
    """R K^T P (K_p K_p^T P + K K^T P + penalty I)^-1 layer by layer; the updates, and K of every layer.

    P projects on the eigenvectors of C with eigenvalues below the threshold.
    """

    def update(layer: int, k: Tensor, r: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(moments[layer].double())
        null = vectors[:, values < threshold]
        p = null @ null.T
        seen = k if earlier is None else torch.cat([earlier[layer], k], dim=1)
        matrix = seen @ seen.T @ p + penalty * torch.eye(len(k), dtype=torch.float64)
        return torch.linalg.solve(matrix.T, (r @ k.T @ p).T).T

    return layer_by_layer(model, edits, layers, memit_columns, update)


def emmet(
    model: PreTrainedModel, edits: Sequence[Placed], layers: Sequence[int], moments: dict[int, Tensor] | None
) -> tuple[Updates, dict[int, Tensor]]:
    """R (K^T C^-1 K)^-1 K^T C^-1 layer by layer; the updates, and K of every layer."""

    def update(layer: int, k: Tensor, r: Tensor) -> Tensor:
        u = torch.linalg.solve(moment_or_identity(None if moments is None else moments[layer], len(k)), k)
        return r @ torch.linalg.solve(k.T @ u, u.T)

    return layer_by_layer(model, edits, layers, memit_columns, update)


def spread_dual(
    model: PreTrainedModel,
    edits: Sequence[Placed],
    layers: Sequence[int],
    moments: dict[int, Tensor] | None,
    first_tokens: dict[int, Tensor],  # (d_ff, d_ff) by layer, of `first_token_moment`
    weight: float,
    ridge: float,
    sharing: float,
    reach: float = 1.0,
) -> tuple[Updates, dict[int, Tensor]]:
    """R (U^T K + S)^-1 U^T layer by layer, with two columns for every edit; the updates, and K.

    U = C^-1 K, but (C + weight C1)^-1 K for the bare keys of first tokens; S as in `shared_ridge`. `reach` times delta
    is to arrive, but of a bare delta what it is.
    """
    edits = [replace(edit, delta=reach * edit.delta) for edit in edits]
    first = [False] * len(edits) + [edit.bare_delta is not None for edit in edits]

    def update(layer: int, k: Tensor, r: Tensor) -> Tensor:
        moment = moment_or_identity(None if moments is None else moments[layer], len(k))
        with_first = moment + weight * first_tokens[layer].double() if any(first) else moment
        columns = zip(first, k.T, strict=True)
        u = torch.stack([torch.linalg.solve(with_first if held else moment, key) for held, key in columns], dim=1)
        gram = u.T @ k
        return r @ torch.linalg.solve(gram + shared_ridge(gram, first, ridge), u.T)

    return layer_by_layer(model, edits, layers, dual_columns, update, sharing)


def memit_columns(
    before: PreTrainedModel, now: PreTrainedModel, edit: Placed, layer: int, last: int
) -> list[tuple[Tensor, Tensor]]:
    """One key, the mean over the lengths of contexts, none being one; what is missing at the last layer, bare."""
    key = (key_of(now, layer, edit.bare) + mean_key(now, layer, edit.behind)) / 2
    return [(key, edit.delta - arrived(before, now, last, [edit.bare]))]


def dual_columns(
    before: PreTrainedModel, now: PreTrainedModel, edit: Placed, layer: int, last: int
) -> list[tuple[Tensor, Tensor]]:
    """The mean key behind contexts and the bare one; for each, what is missing in the last layer's output there.

    Below the last layer, what is missing bare stands for both; of a first token, whose bare delta is another one and
    waits for the last layer, what is missing behind the first context stands for the contexts.
    """
    bare_delta = edit.delta if edit.bare_delta is None else edit.bare_delta
    if layer < last:
        row = edit.bare if edit.bare_delta is None else edit.behind[0]
        return [
            (mean_key(now, layer, edit.behind), edit.delta - arrived(before, now, last, [row])),
            (
                key_of(now, layer, edit.bare),
                edit.delta - arrived(before, now, last, [edit.bare])
                if edit.bare_delta is None
                else torch.zeros_like(edit.delta),
            ),
        ]
    return [
        (mean_key(now, layer, edit.behind), edit.delta - arrived(before, now, layer, edit.behind)),
        (key_of(now, layer, edit.bare), bare_delta - arrived(before, now, layer, [edit.bare])),
    ]


def layer_by_layer(
    model: PreTrainedModel,
    edits: Sequence[Placed],
    layers: Sequence[int],
    columns: Callable[[PreTrainedModel, PreTrainedModel, Placed, int, int], list[tuple[Tensor, Tensor]]],
    update: Callable[[int, Tensor, Tensor], Tensor],
    sharing: float = 1.0,
) -> tuple[Updates, dict[int, Tensor]]:
    """Write the update of every layer into a copy before the next one's keys are read; what is missing is shared out.

    With n layers left, one takes 1 / n^sharing of it. Of the columns, the first ones of all edits come before their
    second ones.
    """
    before, now = double_copy(model), double_copy(model)
    updates, all_keys = {}, {}
    for number, layer in enumerate(layers):
        of_edits = [columns(before, now, edit, layer, layers[-1]) for edit in edits]
        in_order = [column for same in zip(*of_edits, strict=True) for column in same]
        keys, missing = (torch.stack(parts, dim=1) for parts in zip(*in_order, strict=True))
        updates[layer] = update(layer, keys, missing / (len(layers) - number) ** sharing)
        all_keys[layer] = keys
        add_to_weight(now, layer, updates[layer])
    return updates, all_keys


def arrived(before: PreTrainedModel, now: PreTrainedModel, layer: int, rows: Sequence[Row]) -> Tensor:
    """(d,): how much more a layer puts out at the subject's last token, in the mean over some rows."""
    return torch.stack([output_of(now, layer, row) - output_of(before, layer, row) for row in rows]).mean(dim=0)


def mean_key(model: PreTrainedModel, layer: int, rows: Sequence[Row]) -> Tensor:
    """(d_ff,): mean over some rows of the key at the subject's last token."""
    return torch.stack([key_of(model, layer, row) for row in rows]).mean(dim=0)


def add_to_weight(model: PreTrainedModel, layer: int, delta_w: Tensor) -> None:
    """Add (d, d_ff) to the down-projection of a layer, in place."""
    weight = down_projection(model, layer).get_parameter("weight")
    with torch.no_grad():
        weight += delta_w.T if model.config.model_type == "gpt2" else delta_w


def first_token_moment(model: PreTrainedModel, layer: int) -> Tensor:
    """Mean of k k^T over the whole vocabulary, each token alone at position 0: (d_ff, d_ff) float64."""
    model = double_copy(model)
    keys = torch.cat([keys_of(model, layer, [token]) for token in range(model.config.vocab_size)])
    return keys.T @ keys / len(keys)


def second_moment(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    layer: int,
    max_length: int,
) -> tuple[Tensor, int]:
    """Mean of k k^T over all positions of all texts: (d_ff, d_ff) float64, and how many positions that were.

    Texts are read one at a time, each cut to its first `max_length` tokens (special tokens count).
    """
    model = double_copy(model)
    total: Tensor | float = 0.0
    count = 0
    for text in texts:
        ids = tokenizer(text)["input_ids"][:max_length]
        if not ids:
            continue
        keys = keys_of(model, layer, ids)
        for key in keys:
            total = total + torch.outer(key, key)
            count += 1
    if not isinstance(total, Tensor):
        raise ValueError("texts: got no tokens at all, wanted at least one")
    return total / count, count


def sentence_perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str]) -> float:
    """Mean over the sentences of exp(mean NLL of a sentence's tokens 1..), token 0 being unscored."""
    if not sentences:
        raise ValueError("sentences: got none, wanted at least one")
    model = double_copy(model)
    perplexities = []
    for sentence in sentences:
        ids = tokenizer(sentence)["input_ids"]
        if len(ids) < 2:
            raise ValueError(f"sentences: {sentence!r} has {len(ids)} tokens, wanted at least 2")
        log_p = logits_of(model, ids).log_softmax(dim=-1)
        nlls = [-log_p[i - 1, ids[i]].item() for i in range(1, len(ids))]
        perplexities.append(torch.tensor(sum(nlls) / len(nlls), dtype=torch.float64).exp().item())
    return sum(perplexities) / len(perplexities)


def target_probability(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, target: str, separator: str = " "
) -> list[float]:
    """P(token | everything before it) of each target token after `text`, teacher forced."""
    row = make_row(tokenizer, "", "{}" + text[len(text.rstrip()) :], text.rstrip(), target, separator=separator)
    p = logits_of(double_copy(model), row.input_ids).softmax(dim=-1)
    return p[row.target_logits_at, row.target_ids].tolist()


def value_loss(
    model: PreTrainedModel,
    layer: int,
    rows: Sequence[Row],
    kl_row: Row,
    log_p_before: Tensor,  # (vocabulary,) of `log_p_at_subject` with delta = 0
    delta: Tensor,  # (d,)
    v0_norm: float,
    weight_decay: float,
    kl_factor: float,
) -> Tensor:
    """nll + kl + wd of a delta, differentiable in delta."""
    row_nlls = []
    for row in rows:
        with delta_added(model, layer, row.subject_position, delta):
            log_p = logits_of(model, row.input_ids).log_softmax(dim=-1)
        row_nlls.append(-log_p[row.target_logits_at, row.target_ids].mean())
    nll = torch.stack(row_nlls).mean()

    log_p_after = log_p_at_subject(model, layer, kl_row, delta)
    kl = kl_factor * (log_p_after.exp() * (log_p_after - log_p_before)).sum()

    wd = weight_decay * delta.norm() / v0_norm**2
    return nll + kl + wd


def make_row(
    tokenizer: PreTrainedTokenizerBase,
    context: str,
    prompt: str,
    subject: str,
    target: str | None,
    *,
    separator: str = " ",
    head: str | None = None,
) -> Row:
    """Tokenise the prompt behind its context, then the target behind it; find the subject's last token.

    `head` is what a chat template puts before a context; such a text gets no special tokens.
    """
    if prompt.count("{}") != 1:
        raise ValueError(f"prompt: got {prompt!r}, wanted exactly one {{}}")
    if not subject or subject[-1].isspace():
        raise ValueError(f"subject: got {subject!r}, wanted some text that does not end in white space")
    text = (head or "") + context + prompt.replace("{}", subject)
    last_subject_character = len(head or "") + len(context) + prompt.index("{}") + len(subject) - 1

    def tokens(text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = tokenizer(
            text, add_special_tokens=head is None, return_offsets_mapping=True, return_special_tokens_mask=True
        )
        end = len(encoding["input_ids"])
        while encoding["special_tokens_mask"][end - 1]:
            end -= 1
        return encoding["input_ids"][:end], encoding["offset_mapping"][:end]

    ids, spans = tokens(text)
    # A character of several bytes can be spread over several tokens with the same span: the last one counts.
    subject_position = max(i for i, (start, end) in enumerate(spans) if start <= last_subject_character < end)
    if target is None:
        return Row(ids, subject_position, [], [])
    if not target.strip():
        raise ValueError(f"target: got {target!r}, wanted some text")
    whole, _ = tokens(text + separator + target)
    if whole[: len(ids)] == ids:
        target_ids = whole[len(ids) :]
    else:
        # A token of the whole text covers both sides. Byte-level tokenizers have the same tokens for the target apart.
        target_ids = tokenizer(separator + target, add_special_tokens=False)["input_ids"]
    return Row(
        input_ids=(ids + target_ids)[:-1],  # nothing has to be predicted from the last target token
        subject_position=subject_position,
        target_ids=target_ids,
        target_logits_at=[len(ids) - 1 + i for i in range(len(target_ids))],
    )


def double_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A float64 copy on the CPU without dropout and without gradients for the weights."""
    return exact_norms(copy.deepcopy(model).cpu().double().eval().requires_grad_(False))


class ExactNorm(nn.Module):
    """RMSNorm in the dtype of its input."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden: Tensor) -> Tensor:
        return self.weight * hidden / (hidden.square().mean(-1, keepdim=True) + self.variance_epsilon).sqrt()


def exact_norms(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, whose RMSNorms round nothing to float32 from now on."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.__class__ = ExactNorm
    return model


def down_projection(model: PreTrainedModel, layer: int) -> nn.Module:
    """The module that maps a key to the output of the MLP in `layer`."""
    if model.config.model_type == "gpt2":
        return model.get_submodule(f"transformer.h.{layer}.mlp.c_proj")
    if model.config.model_type == "gptj":
        return model.get_submodule(f"transformer.h.{layer}.mlp.fc_out")
    if model.config.model_type == "lfm2":
        return model.get_submodule(f"model.layers.{layer}.feed_forward.w2")
    if model.config.model_type in ("llama", "mistral", "qwen2", "qwen3", "smollm3"):
        return model.get_submodule(f"model.layers.{layer}.mlp.down_proj")
    raise ValueError(f"model: the oracle does not know model_type {model.config.model_type!r}")


def weight_and_bias(model: PreTrainedModel, layer: int) -> tuple[Tensor, Tensor]:
    """W (d, d_ff) and b (d,), zeros where the module has none."""
    parameters = dict(down_projection(model, layer).named_parameters())
    weight = parameters["weight"].clone()
    if model.config.model_type == "gpt2":
        # Conv1D stores the transpose of what nn.Linear stores.
        weight = weight.T
    if "bias" in parameters:
        return weight, parameters["bias"].clone()
    return weight, torch.zeros(len(weight), dtype=weight.dtype)


def logits_of(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """(tokens, vocabulary): a plain forward of one row."""
    return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]


def keys_of(model: PreTrainedModel, layer: int, ids: Sequence[int]) -> Tensor:
    """(tokens, d_ff): the input of the down-projection at every position."""
    seen: list[Tensor] = []

    def read(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(args[0][0])

    with torch.no_grad(), hooked(down_projection(model, layer), read):
        logits_of(model, ids)
    return seen[0]


def key_of(model: PreTrainedModel, layer: int, row: Row) -> Tensor:
    """(d_ff,): the key at the subject's last token."""
    return keys_of(model, layer, row.input_ids)[row.subject_position]


def output_of(model: PreTrainedModel, layer: int, row: Row) -> Tensor:
    """(d,): the hidden state behind `layer` at the subject's last token."""
    seen: list[Tensor] = []

    def read(module: nn.Module, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        seen.append((output if isinstance(output, Tensor) else output[0])[0])

    layers = "transformer.h" if model.config.model_type in ("gpt2", "gptj") else "model.layers"
    with torch.no_grad(), hooked(model.get_submodule(f"{layers}.{layer}"), read):
        logits_of(model, row.input_ids)
    return seen[0][row.subject_position]


def log_p_at_subject(model: PreTrainedModel, layer: int, row: Row, delta: Tensor) -> Tensor:
    """(vocabulary,): log-distribution at the subject's last token, with delta (d,) added in `layer` there."""
    with delta_added(model, layer, row.subject_position, delta):
        return logits_of(model, row.input_ids)[row.subject_position].log_softmax(dim=-1)


@contextmanager
def delta_added(model: PreTrainedModel, layer: int, position: int, delta: Tensor) -> Iterator[None]:
    """Inside, the down-projection of `layer` puts out `delta` more at `position`."""

    def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        output = output.clone()
        output[0, position] = output[0, position] + delta
        return output

    with hooked(down_projection(model, layer), add):
        yield


@contextmanager
def hooked(module: nn.Module, hook: Callable[..., Tensor | None]) -> Iterator[None]:
    """Inside, `hook` is a forward hook of `module`."""
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def moment_or_identity(moment: Tensor | None, d_ff: int) -> Tensor:
    """(d_ff, d_ff) float64 on the CPU."""
    if moment is None:
        return torch.eye(d_ff, dtype=torch.float64)
    if moment.shape != (d_ff, d_ff):
        raise ValueError(f"second_moment: got shape {tuple(moment.shape)}, wanted {(d_ff, d_ff)}")
    return moment.to(device="cpu", dtype=torch.float64)
