"""Choosing among answers: rank classification, and T-Few's three losses (Liu et al. 2022, section 3.2), as in T0.

The input is encoded once and every choice is scored against it. Shapes: b examples, c the largest number of choices,
l the longest choice in tokens. Examples may have different numbers of choices: the missing ones are masked out.
"""

import inspect

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutput

from data import Example, Item, encode_inputs, encode_outputs, pad, pad_rows
from plumbing.ahead import to_device
from plumbing.errors import UserError

UNLIKELIHOOD_EPS = 1e-2  # of T-Few's code: -log(1 - p + eps) stays finite at p = 1


def choice_tensors(
    model: nn.Module, tokenizer, examples: list[Example], max_input: int, max_output: int
) -> dict[str, Tensor]:
    """The tensors of these examples and their choices, on the CPU: inputs, tokens (b, c, l), exists (b, c)."""
    encoder_decoder, c = model.config.is_encoder_decoder, max(len(e.choices) for e in examples)
    flat = [choice for e in examples for choice in (*e.choices, *[""] * (c - len(e.choices)))]
    tokens = pad(encode_outputs(flat, tokenizer, encoder_decoder, max_output), -100).unflatten(0, (-1, c))
    exists = torch.tensor([[k < len(e.choices) for k in range(c)] for e in examples])
    source = pad_rows(encode_inputs(examples, tokenizer, max_input), tokenizer, left=not encoder_decoder)
    return source | {"tokens": tokens, "exists": exists}


def choice_log_probs(
    model: nn.Module, tokenizer, examples: list[Example], max_input: int, max_output: int
) -> tuple[Tensor, Tensor]:
    """`log_probs_of` the choices of these examples."""
    batch = choice_tensors(model, tokenizer, examples, max_input, max_output)
    return log_probs_of(model, to_device(batch, model.device))


def log_probs_of(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(log p (b, c, l), mask (b, c, l)): the log-probability of each token of each choice given the input.

    batch: of `choice_tensors`. mask is True at tokens, False at padding and at choices that an example does not have;
    log p is 0 there. The end-of-text token is a token of the choice. Call it inside `task_ids` of the b examples: the
    layers infer from the shapes that each example has c rows.
    """
    source = {name: batch[name] for name in ("input_ids", "attention_mask")}
    tokens, c = batch["tokens"].flatten(0, 1), batch["tokens"].shape[1]  # (b*c, l)
    score = _encoder_decoder_logits if model.config.is_encoder_decoder else _decoder_only_logits
    logits = score(model, source, tokens, c).float()
    mask = (tokens != -100) & batch["exists"].flatten()[:, None]
    log_p = -cross_entropy(logits.transpose(1, 2), tokens.masked_fill(~mask, -100), reduction="none")
    return log_p.unflatten(0, (-1, c)), mask.unflatten(0, (-1, c))


def _encoder_decoder_logits(model: nn.Module, source: dict, tokens: Tensor, c: int) -> Tensor:
    """Logits (b*c, l, vocabulary) for the tokens of the choices; the encoder runs once per example."""
    hidden = model.get_encoder()(**source).last_hidden_state
    return model(
        encoder_outputs=BaseModelOutput(hidden.repeat_interleave(c, dim=0)),
        attention_mask=source["attention_mask"].repeat_interleave(c, dim=0),
        decoder_input_ids=model.prepare_decoder_input_ids_from_labels(tokens),
    ).logits


def _decoder_only_logits(model: nn.Module, source: dict, tokens: Tensor, c: int) -> Tensor:
    """The same for a decoder-only model: the input (padded on the left) runs once, the choices continue from its cache.

    In training each of the two calls draws its own Gumbel noise; T0's recipe has none.
    """
    mask = source["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    takes = inspect.signature(model.forward).parameters  # positions that follow from the mask are no argument
    at = lambda x: {"position_ids": x} if "position_ids" in takes else {}  # noqa: E731
    if getattr(model, "_is_stateful", False):  # a state cannot be repeated as keys and values can
        return _whole_rows_logits(model, source, tokens, c)
    prefix = model(**source, **at(positions), use_cache=True)
    cache = getattr(prefix, "past_key_values", None)
    if not isinstance(cache, DynamicCache):
        return _whole_rows_logits(model, source, tokens, c)
    first = prefix.logits[:, -1:].repeat_interleave(c, dim=0)
    if tokens.shape[1] == 1:  # --max-output 1 cuts every choice to its end-of-text token
        return first
    cache.batch_repeat_interleave(c)
    ahead = tokens[:, :-1].clamp(min=0)  # the token at place k is predicted from the tokens before it
    last = positions[:, -1:].repeat_interleave(c, dim=0)
    rest = model(
        input_ids=ahead,
        attention_mask=torch.cat([mask.repeat_interleave(c, dim=0), torch.ones_like(ahead)], dim=1),
        **at(last + 1 + torch.arange(ahead.shape[1], device=last.device)),
        past_key_values=cache,
    )
    return torch.cat([first, rest.logits], dim=1)


def _whole_rows_logits(model: nn.Module, source: dict, tokens: Tensor, c: int) -> Tensor:
    """The same without a cache: each choice stands behind its own copy of the input, without padding before it."""
    inputs = [row[mask.bool()] for row, mask in zip(source["input_ids"], source["attention_mask"], strict=True)]
    rows = [torch.cat([inputs[k // c], choice.clamp(min=0)]) for k, choice in enumerate(tokens)]
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    logits = model(input_ids=pad_sequence(rows, batch_first=True), attention_mask=mask, use_cache=False).logits
    starts = [len(inputs[k // c]) - 1 for k in range(len(rows))]  # the token at a place is predicted at the one before
    return torch.stack([one[k : k + tokens.shape[1]] for one, k in zip(logits, starts, strict=True)])


def choice_scores(log_p: Tensor, mask: Tensor) -> Tensor:
    """(b, c): log-probability divided by length, of each choice; -inf for choices that an example does not have."""
    length = mask.sum(-1)
    return (log_p.sum(-1) / length.clamp(min=1)).masked_fill(length == 0, -torch.inf)


def t_few_loss(log_p: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """L_LM + L_LN + L_UL, a scalar. log_p, mask: of `choice_log_probs`. labels (b,): the right choice.

    L_LM  cross-entropy averaged over the tokens of the right choices
    L_LN  cross-entropy over the choices' length-normalised log-probabilities, averaged over examples
    L_UL  unlikelihood, -log(1 - p + 1e-2), averaged over the tokens of all wrong choices
    """
    chosen = torch.arange(log_p.shape[1], device=labels.device) == labels[:, None]  # (b, c)
    right, wrong = mask & chosen[..., None], mask & ~chosen[..., None]  # sums over them: selecting waits for the device
    lm = -(log_p * right).sum() / right.sum()
    ln = cross_entropy(choice_scores(log_p, mask), labels)
    ul = -(torch.log(1 - log_p.exp() + UNLIKELIHOOD_EPS) * wrong).sum() / wrong.sum().clamp(min=1)
    return lm + ln + ul


def labelled_tensors(model, tokenizer, items: list[Item], max_input: int, max_output: int) -> dict[str, Tensor]:
    """`choice_tensors` of a batch, and labels (b,). Raises UserError for an example without choices."""
    examples = [item.example for item in items]
    if not all(e.choices for e in examples):
        raise UserError(
            "T-Few's losses, of this benchmark's recipe, need answer choices: leave such tasks out of --tasks"
        )
    labels = torch.tensor([e.label for e in examples])
    return choice_tensors(model, tokenizer, examples, max_input, max_output) | {"labels": labels}


def loss_of_choices(model, batch: dict[str, Tensor]) -> Tensor:
    """`t_few_loss` of the tensors of `labelled_tensors`: a scalar."""
    return t_few_loss(*log_probs_of(model, batch), batch["labels"])


@torch.no_grad()
def choose(
    model: nn.Module, tokenizer, examples: list[Example], max_input: int, max_output: int
) -> tuple[list[int], list[list[float]]]:
    """Rank classification: for each example the number of the choice with the highest length-normalised score, and the
    scores of its choices."""
    scores = choice_scores(*choice_log_probs(model, tokenizer, examples, max_input, max_output))
    return scores.argmax(-1).tolist(), [row[: len(e.choices)] for row, e in zip(scores.tolist(), examples, strict=True)]
