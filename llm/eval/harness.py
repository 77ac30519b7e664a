"""lm-evaluation-harness runs on our models: log-likelihoods, rolling ones of long texts, and generation until a stop.

What it asks for is sorted by length and worked on in batches; equal inputs are computed once. Under FSDP, ranks with
rows of their own work on different batches at the same time. To the harness there is one rank: all of them make the
same requests and get all answers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs

from llm.data.tokenizer import Tokenizer
from llm.eval.journal import Journal, key
from llm.eval.metrics import windows
from llm.eval.model import Model
from llm.inference.sampling import Sampling
from llm.train.control import Control
from llm.utils.config import ConfigError, EvalConfig

LOGITS = 1 << 28  # values of one batch, 1 GiB in float32, unless one row has more
TELL_SECONDS = 15.0


class Stopped(Exception):
    """Somebody asked the evaluation to leave; what was answered is written down."""


class Scoring(NamedTuple):
    """Targets whose log-probabilities are wanted: each is the one after the token of ``inputs`` at its place, counted
    from the end."""

    inputs: tuple[int, ...]
    targets: list[int]


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """The harness's side of a :class:`Model`. ``journal`` is set for each task."""

    def __init__(self, model: Model, tokenizer: Tokenizer, config: EvalConfig, control: Control) -> None:
        super().__init__()
        self.model, self.text, self.config, self.control = model, tokenizer, config, control
        self.journal: Journal | None = None
        self.world = model.layout.world
        self.rounds = 0
        self._told = time.monotonic()
        self._repeats: dict[str, int] = {}

    # --- tokens ----------------------------------------------------------------------------------------------------

    @property
    def max_length(self) -> int:
        """Positions of a row."""
        return self.model.limit

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text; of a tokenizer without one, a line break."""
        return self.text.encode("\n")[-1] if self.text.end is None else self.text.end

    @property
    def prefix_token_id(self) -> int:
        """What comes before a text that has nothing before it."""
        begin = self._begin()
        return self.eot_token_id if begin is None else begin

    def _begin(self) -> int | None:
        spelling = self.text.named.get("bos_token")
        return None if spelling is None else self.text.special.get(spelling)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text. No token is put before it, as in training, unless ``eval.add_bos``."""
        tokens = self.text.encode(string)
        begin = self._begin()
        if self.config.add_bos and add_special_tokens is not False and begin is not None:
            return [begin, *tokens]
        return tokens

    # --- what the harness asks for ------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The harness's own, which cuts texts into tokens, without its progress bar."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether the likeliest tokens are those."""
        jobs = []
        for (_, answer), context, continuation in requests:
            if len(continuation) > self.max_length:
                raise ConfigError(
                    f"an answer has {len(continuation)} tokens and the model takes {self.max_length}: "
                    f"{answer[:40]!r}…; leave this task out"
                )
            inputs = [*context, *continuation][-(self.max_length + 1) : -1]
            jobs.append(Scoring(tuple(inputs), continuation))
        return [(total, greedy) for total, greedy in self._score("loglikelihood", jobs)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in windows that move by ``eval.stride``."""
        jobs: list[Scoring] = []
        counts = []
        stride = min(self.config.stride or self.max_length, self.max_length)
        for (text,) in (request.args for request in requests):
            cut = list(windows(self.tok_encode(text), self.prefix_token_id, self.max_length, stride))
            jobs += [Scoring(tuple(each.inputs), each.targets[-each.scored :]) for each in cut]
            counts.append(len(cut))
        scored = iter(self._score("loglikelihood", jobs))
        return [sum(next(scored)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to a stop text, the end of text, or as long as is allowed."""
        arguments = [request.args for request in requests]
        keys = [self._key("generate", each) for each in arguments]
        open_ = [at for at, each in enumerate(keys) if not self._known(each)]
        encoded = {at: self.tok_encode(arguments[at][0]) or [self.prefix_token_id] for at in open_}
        # Those with the same settings run together: they end at about the same time.
        open_.sort(key=lambda at: (json.dumps(arguments[at][1], sort_keys=True), -len(encoded[at]), at))
        size = self.config.batch_size
        batches = [open_[at : at + size] for at in range(0, len(open_), size)]

        def work(batch: Sequence[int]) -> list[str]:
            asked = [self._sampling(arguments[at][1], keys[at]) for at in batch]
            prompts = [
                encoded[at][-(self.max_length - sampling.max_tokens) :]
                for at, (sampling, _) in zip(batch, asked, strict=True)
            ]
            tokens = self.model.generate(self.text, prompts, [sampling for sampling, _ in asked])
            return [self._until(each, stop) for each, (_, stop) in zip(tokens, asked, strict=True)]

        self._work("generations", batches, work, keys, ranks=1)
        return [self._answer(each) for each in keys]

    def _sampling(self, given: dict[str, Any], key: str) -> tuple[Sampling, list[str]]:
        """Settings of the harness as ours, and the stop texts. Raises ConfigError for those that there are not."""
        asked = dict(normalize_gen_kwargs(given, self.config.max_gen_tokens))
        stop = [each for each in asked.pop("until") if each]
        tokens = min(asked.pop("max_gen_toks"), self.max_length - 1)
        heat = asked.pop("temperature", 0.0) if asked.pop("do_sample", False) else 0.0
        asked.pop("temperature", None)
        own = {name: asked.pop(name) for name in ("top_k", "top_p", "min_p", "repetition_penalty") if name in asked}
        if asked:
            raise ConfigError(
                f"generation_kwargs of a task have {sorted(asked)}, which there is not: leave this task out"
            )
        seed = self.config.seed + int(key[:8], 16)
        return Sampling(max_tokens=tokens, temperature=heat, stop=tuple(stop), seed=seed, **own), stop

    def _until(self, tokens: Sequence[int], stop: Sequence[str]) -> str:
        """Their text, without special tokens and what a stop text begins, as the harness cuts it."""
        special = {*self.text.special.values(), self.text.end}
        text = self.text.decode(token for token in tokens if token not in special)
        for each in stop:
            text = text.split(each)[0]
        return text

    # --- the work -----------------------------------------------------------------------------------------------------

    def _score(self, kind: str, jobs: Sequence[Scoring]) -> list[tuple[float, bool]]:
        keys = [key(kind, [job.inputs, job.targets], 0) for job in jobs]  # the same question has one answer
        same: dict[tuple[int, ...], dict[str, int]] = {}  # inputs -> the jobs with them, one of each key
        for at, (job, each) in enumerate(zip(jobs, keys, strict=True)):
            if not self._known(each):
                same.setdefault(job.inputs, {}).setdefault(each, at)
        groups = sorted((list(each.values()) for each in same.values()), key=lambda each: -len(jobs[each[0]].inputs))
        batches: list[list[int]] = [[]]
        rows = 0
        for group in groups:
            widest = len(jobs[(batches[-1] or group)[0]].inputs)
            if rows == self.config.batch_size or (rows and (rows + 1) * widest * self.model.vocabulary > LOGITS):
                batches.append([])
                rows = 0
            batches[-1] += group
            rows += 1

        def work(batch: Sequence[int]) -> list[tuple[float, bool]]:
            together: dict[tuple[int, ...], list[int]] = {}
            for at in batch:
                together.setdefault(jobs[at].inputs, []).append(at)
            wanted = [max(len(jobs[at].targets) for at in each) for each in together.values()]
            found: dict[int, tuple[float, bool]] = {}
            for logits, members in zip(self.model.logits(list(together), wanted), together.values(), strict=True):
                chosen, likely = logits.argmax(-1), logits.log_softmax(-1)
                for at in members:
                    targets = torch.tensor(jobs[at].targets, device=logits.device)
                    own = likely[-len(targets) :].gather(1, targets[:, None])
                    found[at] = float(own.sum()), bool((chosen[-len(targets) :] == targets).all())
            return [found[at] for at in batch]

        self._work("log-likelihoods", [each for each in batches if each], work, keys, self.model.layout.dp)
        return [(float(answer[0]), bool(answer[1])) for answer in map(self._answer, keys)]

    def _work(
        self,
        what: str,
        batches: Sequence[Sequence[int]],
        work: Callable[[Sequence[int]], Sequence[Any]],
        keys: Sequence[str],
        ranks: int,
    ) -> None:
        """Answer the batches, ``ranks`` of them at the same time. Raises Stopped after a round if that is asked for."""
        assert self.journal is not None
        layout = self.model.layout
        mine = layout.dp_rank if ranks > 1 else 0
        for first in range(0, len(batches), ranks):
            self.leave_if_asked()
            # FSDP gathers weights from all ranks, so each takes part in every round; the work of some is not needed.
            batch = batches[min(first + mine, len(batches) - 1)]
            answers = work(batch)
            counts = first + mine < len(batches) and (ranks == 1 or layout.tp_rank == 0)
            found = [[keys[at], answer] for at, answer in zip(batch, answers, strict=True)] if counts else []
            everyone = self.world.all_gather_bytes(json.dumps(found).encode()) if ranks > 1 else [json.dumps(found)]
            for text in everyone:
                for each, answer in json.loads(text):
                    self.journal.add(each, answer)
            self._tell(what, min(first + ranks, len(batches)), len(batches))

    def leave_if_asked(self) -> None:
        """Raise ``Stopped`` on all ranks where somebody asks any of them to leave, with the answers written down."""
        self.rounds += 1
        self.control.heartbeat("evaluate", step=self.rounds)
        if self.world.any(self.control.stop_requested()):
            assert self.journal is not None
            self.journal.flush()
            raise Stopped

    def _tell(self, what: str, done: int, count: int) -> None:
        if self.world.rank == 0 and time.monotonic() - self._told > TELL_SECONDS:
            self._told = time.monotonic()
            print(f"  {done} of {count} batches of {what}", flush=True)

    # --- answers that are there already -----------------------------------------------------------------------------

    def begin(self, journal: Journal) -> None:
        """A task begins; ``journal`` has what was answered of it before."""
        self.journal = journal
        self._repeats = {}

    def _key(self, kind: str, arguments: Sequence[Any]) -> str:
        """Another one each time that the same is asked: a sampled answer is not the next one's."""
        once = key(kind, arguments, 0)
        number = self._repeats[once] = self._repeats.get(once, -1) + 1
        return key(kind, arguments, number)

    def _known(self, each: str) -> bool:
        assert self.journal is not None
        return each in self.journal

    def _answer(self, each: str) -> Any:
        assert self.journal is not None
        return self.journal[each]
