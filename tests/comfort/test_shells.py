"""TAB in a real bash, zsh and fish, each at a terminal of its own."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pexpect
import pytest

from tests.packages import programs

TIMEOUT = 60
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>(][0B]?|[\x07\x0f]")
# Ctrl-G shows the line as it stands.
START = {
    "bash": (
        "PS1='> '; PS2=; bind 'set enable-bracketed-paste off'; bind 'set bell-style none'; "
        "bind 'set show-all-if-ambiguous on'; bind 'set completion-query-items 0'; bind 'set page-completions off'; "
        'bind -x \'"\\C-g": printf "<<%s>>\\n" "$READLINE_LINE"\'; source <(llmops completion bash); echo rea""dy'
    ),
    "zsh": (
        "PS1='> '; unsetopt prompt_sp prompt_cr auto_menu list_beep; setopt list_packed; LISTMAX=1000; "
        'autoload -U compinit && compinit -D; show() { zle -I; print -r -- "<<$BUFFER>>" }; zle -N show; '
        'bindkey "^G" show; source <(llmops completion zsh); echo rea""dy'
    ),
}
ARGUMENTS = {"bash": ["--norc", "--noprofile", "-i"], "zsh": ["-f", "-i"]}


class Shell:
    """A shell at a terminal."""

    def __init__(self, name: str, env: dict[str, str], cwd: Path) -> None:
        (path,) = programs(name, packages=(name,))
        self.name = name
        self.terminal = pexpect.spawn(
            path, ARGUMENTS[name], env=env, cwd=str(cwd), encoding="utf-8", timeout=TIMEOUT, dimensions=(200, 120)
        )
        self.terminal.sendline(START[name])
        self.terminal.expect("ready\r\n")

    def tab(self, line: str) -> str:
        """The line after one TAB."""
        self.terminal.send(f"{line}\t\x07")
        self.terminal.expect(r"<<([^\r\n]*)>>\r*\n")
        found: str = self.terminal.match[1]
        self.clear()
        return found

    def listed(self, line: str) -> str:
        """What one TAB shows below the line."""
        self.terminal.send(f"{line}\t\x07")
        self.terminal.expect(r"<<([^\r\n]*)>>\r*\n")
        shown = ESCAPES.sub("", str(self.terminal.before))
        self.clear()
        return shown.partition(line)[2]

    def clear(self) -> None:
        """Leave the line, and wait until it is left."""
        self.terminal.send("\x15\x0b")
        self.terminal.sendline('echo cle""ared')
        self.terminal.expect("cleared\r\n")


@pytest.fixture(scope="module", params=["bash", "zsh"])
def shell(request: pytest.FixtureRequest, shell_env: dict[str, str]) -> Iterator[Shell]:
    started = Shell(request.param, shell_env, Path(shell_env["HOME"]))
    yield started
    started.terminal.close(force=True)


@pytest.fixture(scope="module")
def fish(shell_env: dict[str, str]) -> Callable[[str], dict[str, str]]:
    """What fish offers for a line: each word, and what it is."""
    (path,) = programs("fish", packages=("fish",))
    home = Path(shell_env["HOME"])
    script = subprocess.run(["llmops", "completion", "fish"], env=shell_env, check=True, capture_output=True, text=True)
    folder = home / ".config" / "fish" / "completions"
    folder.mkdir(parents=True)
    (folder / "llmops.fish").write_text(script.stdout)

    def offered(line: str) -> dict[str, str]:
        done = subprocess.run(
            [path, "-c", "complete -C $argv[1]", line],
            env=shell_env,
            cwd=home,
            check=True,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
        assert done.stderr == ""
        return dict(each.partition("\t")[::2] for each in done.stdout.splitlines())  # type: ignore[misc]

    return offered


COMPLETED = [
    ("llmops goodp", "llmops goodput "),
    ("llmops submit --foll", "llmops submit --follow "),
    ("llmops submit mod", "llmops submit model"),  # the group model= or the section model.
    ("llmops submit model=llama3_1", "llmops submit model=llama3_1_8b "),
    ("llmops submit train.warm", "llmops submit train.warmup_steps="),
    ("llmops submit recipe=tiny train.optimizer=mu", "llmops submit recipe=tiny train.optimizer=muon "),
    ("llmops submit train.compile=t", "llmops submit train.compile=true "),
    ("llmops submit +train.z", "llmops submit +train.z_loss="),
    ("llmops submit --backend=sl", "llmops submit --backend=slurm "),
    ("llmops submit cluster=slurm cluster.part", "llmops submit cluster=slurm cluster.partition="),
    ("llmops submit --config-dir conf model=ou", "llmops submit --config-dir conf model=ours "),
    ("llmops sweep model=tiny,llama3_1", "llmops sweep model=tiny,llama3_1_8b "),
    ("llmops sweep rep", "llmops sweep report "),
    ("llmops ckpt ver", "llmops ckpt verify "),
    ("llmops resume base train.max_st", "llmops resume base train.max_steps="),
    ("llmops completion fi", "llmops completion fish "),
    ("llmops schema mod", "llmops schema model "),
]


@pytest.mark.parametrize(("line", "after"), COMPLETED)
def test_a_word_is_completed(shell: Shell, line: str, after: str) -> None:
    assert shell.tab(line) == after


@pytest.mark.parametrize(("line", "after"), COMPLETED)
def test_fish_offers_it(fish: Callable[[str], dict[str, str]], line: str, after: str) -> None:
    word = after.rsplit(" ", 2)[-2] if after.endswith(" ") else after.rpartition(" ")[2]
    offered = fish(line)
    assert word in offered or {f"{word}=", f"{word}."} <= offered.keys()


NAMED = [
    ("llmops logs bas", "base"),
    ("llmops logs two", "two words"),
    ("llmops logs two\\ w", "two words"),
    ("llmops logs 'two w", "two words"),
    ('llmops logs "two w', "two words"),
    ("llmops logs col", "col:on"),
    ("llmops logs col:o", "col:on"),
    ("llmops logs it", "it's"),
    ("llmops logs grö", "größe"),
    ("llmops logs a=", "a=b"),
    ("llmops logs st", "st*r $x"),
    ('llmops logs "st', "st*r $x"),
    ("llmops ckpt ls bas", "base"),
    ("llmops sweep best lr", "lr grid"),
    ("llmops status lr", "lr grid"),
    ("llmops logs 19700101-000001", None),  # its id
]


@pytest.mark.parametrize(("line", "name"), NAMED)
def test_names_arrive_as_they_are(shell: Shell, runs: Path, line: str, name: str | None) -> None:
    expected = name or next(path.name for path in runs.iterdir() if path.name.startswith("19700101-000001"))
    code = f'set -- {shell.tab(line)}; printf %s "${{@: -1}}"'
    assert subprocess.run([shell.name, "-c", code], capture_output=True, text=True, check=True).stdout == expected


@pytest.mark.parametrize(("line", "name"), [each for each in NAMED if each[1]])
def test_fish_knows_the_names(fish: Callable[[str], dict[str, str]], line: str, name: str) -> None:
    assert name in fish(line)


def test_what_may_follow_is_listed(shell: Shell) -> None:
    shown = shell.listed("llmops ")
    assert "submit" in shown
    assert "completion" in shown
    shown = shell.listed("llmops submit train.l")
    assert all(key in shown for key in ("train.lr=", "train.log_every=", "train.loss_chunk="))
    assert "train.seed" not in shown
    shown = shell.listed("llmops logs ")
    assert "größe" in shown
    assert "lr grid" not in shown


def test_zsh_and_fish_say_what_a_word_is(shell: Shell, fish: Callable[[str], dict[str, str]]) -> None:
    assert fish("llmops submit train.l")["train.lr="].startswith("peak learning rate")
    assert fish("llmops submit model=")["model=7b"].startswith("6.7 billion parameters")
    if shell.name == "zsh":
        assert "peak learning rate" in shell.listed("llmops submit train.l")


def test_files_and_folders(shell: Shell, fish: Callable[[str], dict[str, str]], shell_env: dict[str, str]) -> None:
    home = Path(shell_env["HOME"])
    (home / "script.py").touch()
    assert shell.tab("llmops submit -- python scr") == "llmops submit -- python script.py "
    assert shell.tab("llmops submit --config-dir co") in ("llmops submit --config-dir conf/",)
    assert shell.tab("llmops submit data.source=scr") == "llmops submit data.source=script.py "
    assert "script.py" in fish("llmops submit -- python scr")
    assert "data.source=script.py" in fish("llmops submit data.source=scr")
    assert "conf/" in fish("llmops submit --config-dir c")


def test_what_breaks_stays_silent(shell: Shell, shell_env: dict[str, str]) -> None:
    broken = Path(shell_env["HOME"]) / "broken"
    broken.mkdir(exist_ok=True)
    (broken / "llmops").write_text("#!/bin/sh\necho Traceback >&2\nexit 1\n")
    (broken / "llmops").chmod(0o755)
    shell.terminal.sendline(f'old=$PATH; PATH={broken}:$PATH; hash -r; echo s""et')
    shell.terminal.expect("set\r\n")
    assert "Traceback" not in shell.listed("llmops sub")
    shell.terminal.sendline('PATH=$old; hash -r; echo b""ack')
    shell.terminal.expect("back\r\n")
