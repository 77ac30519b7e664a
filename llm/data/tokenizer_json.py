"""Hugging Face's ``tokenizer.json``.

The library takes text for special tokens wherever it spells them, and its ``encode_special_tokens`` only helps where
the model's own vocabulary does not hold the spelling too. Here each special token gets a spelling that is made up when
the file is loaded and that no text can know. Ids stay what they are, ordinary text cannot make a special token, and a
chat is still encoded as one string, in which the template's own special tokens have their new spelling.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llm.data import words
from llm.data.tokenizer import Part, Tokenizer, well_formed
from llm.utils.config import ConfigError

if TYPE_CHECKING:
    import tokenizers

# Tokens that end a document, where no tokenizer_config.json names one.
ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<｜end▁of▁sentence｜>", "<|eos|>", "<|im_end|>", "<EOT>")
NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")
# What of tokenizer_config.json goes into the copy, at the end of the "model", where the library reads past it.
KEPT = "llm_tokenizer_config"
BATCH = 256  # texts that the library gets at a time: what it returns is heavy


def load_json(name: str, data: bytes, beside: dict[str, bytes | None]) -> JsonTokenizer:
    """The tokenizer of a file with this content and these files beside it. Raises ConfigError."""
    try:
        data, kept = _without_kept(data)
        settings = kept if kept is not None else _settings(beside)
        described = json.loads(data)
        if not isinstance(described["model"]["vocab"], dict | list):
            raise TypeError("model.vocab is neither an object nor a list")
        return JsonTokenizer(name, data, described, settings, frozenset())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"data.tokenizer={name}: no tokenizer.json of Hugging Face: {_told(error)}") from error


class JsonTokenizer:
    """A tokenizer of the ``tokenizers`` library, without its truncation, padding and templates."""

    def __init__(
        self, name: str, data: bytes, described: dict[str, Any], settings: dict[str, str], also_special: frozenset[str]
    ) -> None:
        self.name = name
        self.sha256 = hashlib.sha256(data).hexdigest()
        self.chat_template = settings.get("chat_template")
        self.named = {key: value for key, value in settings.items() if key in NAMED}
        self._data, self._described, self._settings = data, described, settings
        added = {token["content"]: token for token in described.get("added_tokens") or []}
        hidden = {
            text: f"<|{secrets.token_hex(12)}|>"
            for text, token in added.items()
            if token.get("special") or text in also_special
        }
        self.added = frozenset(text for text in added if text not in hidden)  # these are text, says the file
        self._library = _library(name, _renamed(described, hidden))
        vocab = self._library.get_vocab()
        self.vocab_size = max(vocab.values()) + 1
        self.special = {text: vocab[secret] for text, secret in hidden.items()}
        self._by_id = {vocab[secret]: secret for secret in hidden.values()}
        self._spellings = {secret: text for text, secret in hidden.items()}
        self._mark = f"<|{secrets.token_hex(12)}|>"  # between spans
        self._library.add_special_tokens([self._mark])
        self._mark_id = self._library.token_to_id(self._mark)
        self.end = self._end()
        self._words = self._fast()
        self._text_tokens = re.compile("|".join(map(re.escape, self.added))) if self.added else None

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text."""
        found = self._from_words(text)
        ids: list[int]
        if found is not None:
            ids = found.tolist()
        else:
            ids = self._library.encode(well_formed(text), add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Ids of each text. What the words' way cannot do is the library's, on as many threads as RAYON_NUM_THREADS."""
        found = [self._from_words(text) for text in texts]
        slow = [at for at, array in enumerate(found) if array is None]
        for first in range(0, len(slow), BATCH):
            part = slow[first : first + BATCH]
            encoded = self._library.encode_batch_fast([well_formed(texts[at]) for at in part], add_special_tokens=False)
            for at, encoding in zip(part, encoded, strict=True):
                found[at] = np.array(encoding.ids, np.uint32)
        return [array for array in found if array is not None]

    def encode_spans(self, spans: Sequence[Sequence[Part]]) -> list[list[int]]:
        """Ids of each span. Raises ConfigError where the tokenizer adds a space to what follows a special token."""
        if not self._joins:
            raise ConfigError(
                f"data.tokenizer={self.name}: it changes text that begins in the middle (an added space, say), so that "
                "the tokens of an assistant's turn cannot be told exactly; use one without prefix space for chats"
            )
        text = self._mark.join("".join(self._spelled(part) for part in span) for span in spans)
        found: list[list[int]] = [[]]
        for token in self._library.encode(text, add_special_tokens=False).ids:
            if token == self._mark_id:
                found.append([])
            else:
                found[-1].append(token)
        return found

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of ``tokens``, special ones as they are spelled in the file."""
        text = self._library.decode(
            [token for token in tokens if 0 <= token < self.vocab_size], skip_special_tokens=False
        )
        return re.sub(r"<\|[0-9a-f]{24}\|>", lambda match: self._spellings.get(match[0], match[0]), text)

    def with_special(self, spellings: frozenset[str]) -> Tokenizer:
        """The same with these added tokens as special ones."""
        if spellings <= self.special.keys():
            return self
        return JsonTokenizer(self.name, self._data, self._described, self._settings, spellings)

    def original(self) -> bytes:
        """The ``tokenizer.json`` as it was, without what its copy has."""
        return self._data

    def file(self) -> bytes:
        """The file, with what the folder's other files say about tokens and chats inside."""
        if not self._settings:
            return self._data
        kept = json.dumps(self._settings).encode()
        end = self._data.rstrip()[:-1].rstrip()  # without the document's own brace, and then without the model's
        copy = end[:-1] + f', "{KEPT}": '.encode() + kept + self._data[len(end) - 1 :]
        if not end.endswith(b"}") or KEPT not in json.loads(copy)["model"]:
            raise ConfigError(
                f'data.tokenizer={self.name}: "model" has to be the last key of the file: save it with Tokenizer.save'
            )
        return copy

    def _spelled(self, part: Part) -> str:
        return self._by_id[part] if isinstance(part, int) else well_formed(part)

    @cached_property
    def _joins(self) -> bool:
        """Whether a text that is cut in two by a special token keeps its characters."""
        ids = self._library.encode(f"x{self._mark}x", add_special_tokens=False).ids
        return self._library.decode([token for token in ids if token != self._mark_id]) in ("xx", " xx")

    def _end(self) -> int | None:
        named = self.named.get("eos_token")
        if named is not None:
            token = self.special.get(named)
            if token is None and named in self.added:
                token = self._library.token_to_id(named)
            if token is None:
                raise ConfigError(
                    f"data.tokenizer={self.name}: tokenizer_config.json says eos_token={named}, which is none of "
                    "the special tokens of tokenizer.json"
                )
            return token
        return next((self.special[text] for text in ENDS if text in self.special), None)

    def _from_words(self, text: str) -> NDArray[np.uint32] | None:
        if self._words is None or (self._text_tokens and self._text_tokens.search(text)):
            return None
        if self._composes and not text.isascii() and not unicodedata.is_normalized("NFC", text):
            return None
        return self._words.ids(text)

    def _fast(self) -> words.Words | None:
        """The words' way, for a byte-level BPE that splits as one of the known ones."""
        described = self._described
        normalizer, model = described.get("normalizer"), described["model"]
        self._composes = normalizer == {"type": "NFC"}
        pattern = _pattern(described.get("pre_tokenizer"))
        if (normalizer and not self._composes) or pattern is None or model.get("type") != "BPE" or model.get("dropout"):
            return None
        bpe, letters = self._library.model, byte_letters()

        def encode(word: str) -> list[int]:
            return [token.id for token in bpe.tokenize(word.encode().decode("latin-1").translate(letters))]

        return words.Words(pattern, encode)


def _pattern(described: Any) -> str | None:
    """The known pattern by which this ``pre_tokenizer`` splits before it maps bytes to letters."""
    steps = [described]
    if isinstance(described, dict) and described.get("type") == "Sequence":
        steps = described["pretokenizers"]
    match steps:
        case [{"type": "ByteLevel", "add_prefix_space": False, **rest}] if rest.get("use_regex", True):
            return words.GPT2
        case [
            {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": behavior, "invert": invert},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ] if (behavior, invert) in (("Isolated", False), ("Removed", True)):
            return pattern if pattern in words.KNOWN else None
    return None


def byte_letters() -> dict[int, int]:
    """Byte -> the letter that stands for it in byte-level vocabularies (GPT-2's): itself if it can be seen."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in seen]
    return {byte: 256 + at for at, byte in enumerate(rest)}


def _library(name: str, described: dict[str, Any]) -> tokenizers.Tokenizer:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ConfigError(f"data.tokenizer={name} needs the package tokenizers: pip install 'llmops[data]'") from error
    try:
        return Tokenizer.from_str(json.dumps(described))
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(f"data.tokenizer={name}: no tokenizer.json of Hugging Face: {_told(error)}") from error


def _renamed(described: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """The same tokenizer with other spellings of some tokens, and nothing done to texts beside encoding them."""
    model = dict(described["model"])
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(text, text): token for text, token in vocab.items()}
    else:  # Unigram: pairs of text and score
        model["vocab"] = [[names.get(text, text), score] for text, score in vocab]
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if not _makes(merge, names)]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    added = [
        {**token, "content": names.get(token["content"], token["content"])}
        for token in described.get("added_tokens") or []
    ]
    return {
        **described,
        "model": model,
        "added_tokens": added,
        "post_processor": None,
        "truncation": None,
        "padding": None,
    }


def _makes(merge: str | list[str], names: dict[str, str]) -> bool:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left in names or right in names or left + right in names


def _without_kept(data: bytes) -> tuple[bytes, dict[str, str] | None]:
    """The original of a copy that ``JsonTokenizer.file`` made, and what was added to it."""
    key = f', "{KEPT}": '.encode()
    at = data.rfind(key)
    if at < 0:
        return data, None
    text = data[at + len(key) :].decode()
    kept, end = json.JSONDecoder().raw_decode(text)
    kept = {str(name): str(value) for name, value in kept.items()}
    return data[:at] + text[end:].encode(), kept


def _settings(beside: dict[str, bytes | None]) -> dict[str, str]:
    config = json.loads(beside.get("tokenizer_config.json") or b"{}")
    found = {}
    for key in NAMED:
        value = config.get(key)
        if isinstance(value, dict):  # a token with its attributes
            value = value["content"]
        if isinstance(value, str):
            found[key] = value
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if file := beside.get("chat_template.jinja"):
        template = file.decode()
    return {**found, "chat_template": template} if isinstance(template, str) else found


def _told(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
