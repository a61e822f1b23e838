"""Reads instructions and answers in common formats, as tokens and labels.

A label is a token of an answer, or −100. An answer is the text after the prompt, including the token that
ends it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sift_train.fingerprints import fingerprint_of
from sift_train.text_files import read_text, tell_unused

IGNORED = -100
ROLES = ("system", "user", "assistant")
TEMPLATES = ("auto", "chat", "alpaca")
PAD_TO = 8  # row lengths are multiples of it, for tensor cores

# The exact prompts of Stanford Alpaca, which models tuned with them expect.
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)

_OF_CHAT, _OF_INSTRUCTIONS = {"messages"}, {"instruction", "input", "output", "instances"}

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Message:
    """One message of a conversation.

    Attributes:
        role: one of ``ROLES``.
        content: the text, without the input of an instruction.
        input: the input of an instruction.
    """

    role: str
    content: str
    input: str = ""

    @property
    def text(self) -> str:
        """Content and input."""
        return f"{self.content}\n\n{self.input}" if self.input else self.content


Conversation = tuple[Message, ...]


@dataclass(frozen=True)
class Tokens:
    """The tokens of an example, and a label for each."""

    input_ids: list[int]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def n_learnt(self) -> int:
        """Number of learnt tokens."""
        return sum(label != IGNORED for label in self.labels)


@dataclass(frozen=True)
class Piece:
    """A text, with the spans of its answers in characters."""

    text: str
    answers: list[tuple[int, int]]


def read_conversations(path: Path) -> list[Conversation]:
    """Return the conversations of a JSON or JSON-lines file; the keys show the format.

    The formats are Alpaca (``instruction``, ``input``, ``output``), chat ``messages`` of ``role`` and
    ``content``, and self-instruct (``instruction``, ``instances`` of ``input`` and ``output``).

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not JSON, a record has another format, there is no record, or all
            answers are empty.
    """
    found: list[Conversation] = []
    keys: set[str] = set()
    for where, record in _read_records(path):
        found += _conversations_of(record, where)
        keys.update(record)
    tell_unused(path, keys - (_OF_CHAT if "messages" in keys else _OF_INSTRUCTIONS))
    if not found:
        raise ValueError(f"'{path}' holds no example; give a file with at least one")
    if all(_is_empty(conversation) for conversation in found):
        raise ValueError(
            f"all {len(found)} examples of '{path}' have empty answers; there is nothing to learn"
        )
    return found


def count_empty(conversations: Iterable[Conversation]) -> int:
    """Return the number of conversations whose answers are all empty."""
    return sum(map(_is_empty, conversations))


def _is_empty(conversation: Conversation) -> bool:
    return not any(m.content.strip() for m in conversation if m.role == "assistant")


def choose_template(template: str, tokenizer: Any) -> str:
    """Return ``"chat"`` or ``"alpaca"``; ``"auto"`` means chat if the tokenizer has a template.

    Raises:
        ValueError: the template is ``"chat"`` and the tokenizer has no chat template.
    """
    has_one = bool(getattr(tokenizer, "chat_template", None))
    if template == "chat" and not has_one:
        raise ValueError("the tokenizer has no chat template; use the Alpaca prompt")
    if template == "auto":
        return "chat" if has_one else "alpaca"
    return template


def encode(
    conversations: Iterable[Conversation], tokenizer: Any, *, template: str, max_tokens: int
) -> tuple[list[Tokens], int]:
    """Return the tokens of the conversations, and the number of pieces left out.

    All pieces are cut at ``max_tokens``; a piece without any token of an answer before the cut is left out.

    Args:
        conversations: the conversations.
        tokenizer: a tokenizer of transformers, fast or slow.
        template: one of ``TEMPLATES``.
        max_tokens: maximum tokens of an example.

    Raises:
        ValueError: the template cannot be used for a conversation, or nothing is left.
    """
    template = choose_template(template, tokenizer)
    kept, n_left_out = [], 0
    for conversation in conversations:
        render = render_chat if template == "chat" else render_alpaca
        for piece in render(conversation, tokenizer):
            tokens = _encode_piece(piece, tokenizer, is_chat=template == "chat")
            cut = Tokens(tokens.input_ids[:max_tokens], tokens.labels[:max_tokens])
            if cut.n_learnt:
                kept.append(cut)
            else:
                n_left_out += 1
    if not kept:
        raise ValueError(
            f"no example has a token of its answer within {max_tokens} tokens; allow more"
        )
    return kept, n_left_out


def render_alpaca(conversation: Conversation, tokenizer: Any) -> list[Piece]:
    """Return a conversation of one instruction and its answer as one piece.

    Raises:
        ValueError: the conversation has other messages.
    """
    roles = tuple(message.role for message in conversation)
    if roles != ("user", "assistant"):
        raise ValueError(
            f"a conversation goes {', '.join(roles)}, but the Alpaca prompt takes one instruction and "
            "its answer; use a tokenizer with a chat template"
        )
    user, answer = conversation
    form = WITH_INPUT if user.input else WITHOUT_INPUT
    prompt = form.format_map({"instruction": user.content, "input": user.input})
    return [Piece(prompt + answer.content, [(len(prompt), len(prompt) + len(answer.content))])]


def render_chat(conversation: Conversation, tokenizer: Any) -> list[Piece]:
    """Return a conversation formatted by its chat template, as pieces.

    This is one piece. If the template writes a message differently when others follow it, for example
    without its reasoning, there is one piece for each answer.

    Raises:
        ValueError: the template does not write an answer directly after its prompt, or raises.
    """
    messages = [{"role": message.role, "content": message.text} for message in conversation]
    pieces = []
    for n, message in enumerate(conversation):
        if message.role != "assistant":
            continue
        prompt = _rendered(messages[:n], tokenizer, is_prompt=True)
        whole = _rendered(messages[: n + 1], tokenizer, is_prompt=False)
        if not whole.startswith(prompt):
            raise ValueError(
                "the chat template does not write an answer right after its prompt, so the tokens "
                "to learn are not known; use the Alpaca prompt or another chat template"
            )
        pieces.append(Piece(whole, [(len(prompt), len(whole))]))
    if all(pieces[-1].text.startswith(piece.text) for piece in pieces):
        return [Piece(pieces[-1].text, [piece.answers[0] for piece in pieces])]
    return pieces


def _rendered(messages: list[dict[str, str]], tokenizer: Any, *, is_prompt: bool) -> str:
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=is_prompt
        )
    except TemplateError as error:
        raise ValueError(f"the chat template refuses a conversation: {error}") from error
    return text


def _encode_piece(piece: Piece, tokenizer: Any, *, is_chat: bool) -> Tokens:
    """Return the tokens of a piece; a token across the start of an answer belongs to the answer.

    A chat template writes the special tokens itself; otherwise the tokenizer adds them.
    """

    def ids_of(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=not is_chat)["input_ids"]
        return ids

    ids = ids_of(piece.text)
    labels = [IGNORED] * len(ids)
    for start, end in piece.answers:
        first = _n_common(ids, ids_of(piece.text[:start]))
        last = len(ids) if end == len(piece.text) else _n_common(ids, ids_of(piece.text[:end]))
        labels[first:last] = ids[first:last]
    if not is_chat and ids[-1:] != [tokenizer.eos_token_id]:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no end-of-text token, with which an answer ends; set its eos_token (in tokenizer_config.json)"
            )
        ids.append(tokenizer.eos_token_id)
        labels.append(tokenizer.eos_token_id)
    labels[0] = IGNORED  # the first token follows another example in a pack, or nothing
    return Tokens(ids, labels)


def _n_common(left: Sequence[int], right: Sequence[int]) -> int:
    pairs = zip(left, right, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


def _read_records(path: Path) -> Iterator[tuple[str, Any]]:
    text = read_text(path, "examples")
    if text.lstrip().startswith("["):
        try:
            records = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"'{path}' begins as a JSON list but is not one: {error}") from error
        for number, record in enumerate(records, 1):
            yield f"record {number} of '{path}'", record
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"line {number} of '{path}' is no JSON: {error.msg} at column {error.colno}; expected "
                "a JSON list, or one record on each line"
            ) from error
        yield f"line {number} of '{path}'", record


def _conversations_of(record: Any, where: str) -> list[Conversation]:
    if not isinstance(record, Mapping):
        raise ValueError(f"{where} is no JSON object; each example is one")
    if "messages" in record:
        return [_messages_of(record["messages"], where)]
    if "instruction" in record and isinstance(record.get("instances"), list):
        return [_pair(record["instruction"], one, where) for one in record["instances"]]
    if "instruction" in record and "output" in record:
        return [_pair(record["instruction"], record, where)]
    raise ValueError(
        f"{where} has the keys {', '.join(sorted(record))}; expected messages, or instruction and "
        "output, or instruction and instances"
    )


def _messages_of(messages: Any, where: str) -> Conversation:
    if not isinstance(messages, list) or not all(isinstance(m, Mapping) for m in messages):
        raise ValueError(f"{where}: messages is not a list of objects with role and content")
    found = tuple(Message(_text(m, "role", where), _text(m, "content", where)) for m in messages)
    for message in found:
        if message.role not in ROLES:
            raise ValueError(
                f"{where} has a message of role {message.role!r}; expected {', '.join(ROLES)}"
            )
    if not any(message.role == "assistant" for message in found):
        raise ValueError(f"{where} has no message of the assistant, so there is no answer to learn")
    return found


def _pair(instruction: Any, rest: Any, where: str) -> Conversation:
    if not isinstance(instruction, str) or not isinstance(rest, Mapping):
        raise ValueError(f"{where}: the instruction is not a text, or an instance is not an object")
    given = _text(rest, "input", where) if "input" in rest else ""
    return (
        Message("user", instruction, given),
        Message("assistant", _text(rest, "output", where)),
    )


def _text(record: Mapping[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key} is {value!r}, expected text")
    return value


def pack(examples: Sequence[Tokens], max_tokens: int) -> list[list[Tokens]]:
    """Return the examples in rows of at most ``max_tokens``, best fit first; none is cut."""
    from datasets import Dataset  # type: ignore[import-untyped]
    from datasets.utils.logging import disable_progress_bar  # type: ignore[import-untyped]
    from trl.data_utils import pack_dataset

    disable_progress_bar()
    numbers = Dataset.from_dict({"number": [[n] * len(e) for n, e in enumerate(examples)]})
    rows: Any = pack_dataset(numbers, max_tokens)
    return [[examples[n] for n in dict.fromkeys(row)] for row in rows["number"]]


def collate(rows: Sequence[Sequence[Tokens]], *, pad_id: int, is_packed: bool) -> Batch:
    """Return a micro-batch with one row for each list of examples.

    In packed rows the position ids restart at each example and there is no attention mask. From this
    transformers concludes that examples must not attend to each other. Padding is one more example.

    Args:
        rows: lists of examples, with one each unless packed.
        pad_id: token for the padding.
        is_packed: whether rows can have several examples.
    """
    lengths = [sum(len(example) for example in row) for row in rows]
    width = -(-max(lengths) // PAD_TO) * PAD_TO
    ids = torch.full((len(rows), width), pad_id)
    labels = torch.full((len(rows), width), IGNORED)
    positions = torch.zeros((len(rows), width), dtype=torch.int64)
    for number, row in enumerate(rows):
        start = 0
        for example in row:
            end = start + len(example)
            ids[number, start:end] = torch.tensor(example.input_ids)
            labels[number, start:end] = torch.tensor(example.labels)
            positions[number, start:end] = torch.arange(len(example))
            start = end
        positions[number, start:] = torch.arange(width - start)
    if is_packed:
        return {"input_ids": ids, "labels": labels, "position_ids": positions}
    is_token = torch.arange(width) < torch.tensor(lengths)[:, None]
    return {"input_ids": ids, "labels": labels, "attention_mask": is_token.long()}


class Steps:
    """Micro-batches, grouped by optimizer step, in a new random order on every pass.

    Each micro-batch has ``n_learnt``: the step's learnt tokens / its number of micro-batches. The summed
    loss / ``n_learnt``, averaged over the step's micro-batches, is the mean over the step's tokens.

    Args:
        rows: lists of examples, with one each unless packed.
        batch: rows per optimizer step.
        micro_batch: rows per micro-batch.
        pad_id: token for the padding.
        is_packed: whether rows can have several examples.
        is_flat: join the rows of a micro-batch into one, as flash attention needs.

    Attributes:
        fingerprint: as for ``fit``.
    """

    def __init__(
        self,
        rows: Sequence[Sequence[Tokens]],
        *,
        batch: int,
        micro_batch: int,
        pad_id: int,
        is_packed: bool,
        is_flat: bool = False,
    ) -> None:
        self._rows = rows
        self._batch = batch
        self._micro_batch = micro_batch
        self._pad_id = pad_id
        self._is_packed = is_packed
        self._is_flat = is_flat
        self.fingerprint = fingerprint_of([batch, micro_batch, *rows])

    def __len__(self) -> int:
        whole, rest = divmod(len(self._rows), self._batch)
        return whole * (self._batch // self._micro_batch) + -(-rest // self._micro_batch)

    def __iter__(self) -> Iterator[Batch]:
        order = torch.randperm(len(self._rows)).tolist()
        for group in _split(order, self._batch):
            parts = [[self._rows[n] for n in part] for part in _split(group, self._micro_batch)]
            n_learnt = sum(e.n_learnt for part in parts for row in part for e in row)
            share = torch.tensor(n_learnt / len(parts))
            for part in parts:
                if self._is_flat:
                    part = [[example for row in part for example in row]]
                made = collate(part, pad_id=self._pad_id, is_packed=self._is_packed)
                yield {**made, "n_learnt": share}


def _split(items: list[int], n: int) -> list[list[int]]:
    return [items[at : at + n] for at in range(0, len(items), n)]


def plain_loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the summed loss of all labels, divided by ``n_learnt``; all logits exist at once."""
    inputs, targets = split_batch(batch)
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    flat = logits.float().flatten(0, 1)
    loss = nn.functional.cross_entropy(flat, targets, ignore_index=IGNORED, reduction="sum")
    return loss / batch["n_learnt"]


def split_batch(batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Return the inputs of the model, and the label that follows each token but the last, flat."""
    inputs = {name: batch[name] for name in batch if name not in ("labels", "n_learnt")}
    return inputs, batch["labels"][:, 1:].flatten()
