"""Every page's ``bash`` blocks are pasted into one shell, in order, as a reader would."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm import cluster
from tests.ssh.sshd import Sshd

TREE = Path(__file__).parents[1]
BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = {path.name: BLOCK.findall(path.read_text()) for path in sorted((TREE / "docs").glob("*.md"))}
# What a page must have shown, besides not failing.
SHOWN = {
    "quickstart.md": ["finished", "resumed", "agent/", "loss by step"],
    "programs.md": ["rank 0 of 2", "rank 1 of 2"],
    "preempt.md": ["cancelled", "done at 100"],
    "configuration.md": ["no key train.learning_rate", "model.n_heads=3", "exit code 2"],
    "checkpoints.md": ["latest", " ok ", "state.step: 10 -> 20", "no rule keeps it", "removed step_00000010/0000-0000"],
    "sweeps.md": ["4 trials", "pool --study", "first-sweep/3", "train.lr=", "nothing was submitted", "wrote /tmp"],
    "metrics.md": [
        "job_kind",
        'state="running"} 1.0',
        "llmops_node_rank_up",
        "llmops_train_tokens_total",
        "metrics-train",
    ],
    "hydra.md": ["held-out loss", "point 3"],
    "watching.md": ["finished", "goodput", "committed", "loss by step", "training that a commit holds"],
    "dashboard.md": ['"name":"shown"', "the dashboard ended with 0"],
    "notifications.md": ["finished on local after 1 attempt", "give env:NAME", "exit code 2"],
    "top.md": ["needs a terminal", "exit code 2"],
    "logs.md": ["hello from 1", "rank 1 on", "IndexError: list index out of range", "exit code 1"],
    "profiling.md": [
        "events.out.tfevents.000000",
        "rank00001.000000.json",
        "step_00000005.rank00000.txt",
        "bit by bit",
    ],
    "data.md": [
        "rows of 129 filled to",
        "duplicates",
        " drop",
        "none of the first 100 lines",
        "exit code 2",
        "finished",
    ],
    "tokenizers.md": ["wrote /tmp/", "2048 0 ", "To be, or not", "learnt: Nay, answer me.<|im_end|>", "exit code 2"],
    "plan.md": [
        "least is lost with",
        "parameters on 64 ranks",
        "layouts fit",
        "no layout of so few ranks",
        "exit code 2",
    ],
    "training.md": ["finished", "held-out loss", "dist.tp=3 does not divide"],
    "reading.md": ["one-epoch", "finished", "held-out loss", "  down ", "was packed for sequences of 128"],
    "finetuning.md": [
        "chats",
        "held-out loss",
        "none is trained",
        "merged",
        "adapter_config.json",
        "model.safetensors.index.json",
        "adapters are halves",
    ],
    "serving.md": ["bard at http://127.0.0.1:8123/v1", "'To be", "logit_bias unsupported_parameter"],
    "generation.md": [
        "guesses were right",
        "top_p=0.0: above 0, at most 1",
        "length '",
        "wrote config.yaml",
        "generation_config.json",
        "README.md",
    ],
    "evaluation.md": ["judged-eval", "token_perplexity", "step=11", "exit code 2", "princes acc"],
    "saving.md": ["finished", "latest", "step_"],
    "comfort.md": [
        "-F _llmops llmops",
        "did you mean llama3_2_1b?",
        "did you mean bfloat16?",
        "exit code 2",
        '"$schema"',
        "hello, moon",
        "env.WHOM",
        '"left": {',
    ],
    "cli.md": ['"state": "finished"', "usage: llmops submit"],
    "troubleshooting.md": ["no such file: corpus.txt", "retry.max_no_progress=1", "exit code 1"],
    "kubernetes.md": [
        "kind: JobSet",
        "completions: 2",
        "hostname: here",
        "did you mean 64Gi?",
        "exit code 2",
        "claimName",
        "completions: 12",
        "FailIndex",
        "nothing was submitted of 2 trials",
    ],
    "ssh.md": ["finished", "latest", "is no host", "ssh://login.example.org/scratch/me/runs", "exit code 2"],
    "torchx.md": [
        "State: SUCCEEDED",
        "hello from 1 of 2, app 2",
        "llmops_local://torchx/2",
        "AWS_BATCH_JOB_NODE_INDEX",
        "] node 1",
        "did you mean log_dir?",
        "exit code 2",
    ],
    "doctor.md": ["folder called cluster", "ships cluster/k8s.yaml", "ranks meet", '"result": "ok"', "put "],
    "slurm.md": ["finished", "cluster.nodes=99", "exit code 2", "a token of 17 characters"],
}


def paste(page: str, tmp_path: Path, **more: str) -> str:
    """Run the page's blocks; what the terminal showed."""
    script = "set -eo pipefail\n" + "\n".join(PAGES[page])
    env = {
        **os.environ,
        "HOME": str(tmp_path),
        "LLMOPS_RUNS_URL": str(tmp_path / "runs"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        **more,
    }
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=TREE,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize("page", [page for page in PAGES if PAGES[page] and page not in ("slurm.md", "ssh.md")])
def test_a_page_works_when_pasted(page, tmp_path):
    shown = paste(page, tmp_path)
    for text in SHOWN[page]:
        assert text in shown, shown


@pytest.mark.slurm
def test_the_slurm_page_works_when_pasted(slurm, tmp_path):
    shown = paste("slurm.md", tmp_path)
    cluster.cancel_all()
    for text in SHOWN["slurm.md"]:
        assert text in shown, shown


@pytest.mark.slurm
def test_the_ssh_page_works_when_pasted(slurm, tmp_path):
    daemon = Sshd(tmp_path / "sshd", "login.example.org")
    places = {"LLMOPS_RUNS_URL": f"ssh://login.example.org{tmp_path}/runs", "LLMOPS_SSH_CONFIG": str(daemon.config)}
    try:
        shown = paste("ssh.md", tmp_path, JOB_PYTHON=sys.executable, **places)
    finally:
        cluster.cancel_all()
        daemon.stop()
    for text in SHOWN["ssh.md"]:
        assert text in shown, shown


def test_the_pages_name_each_other_and_the_menu_names_all():
    menu = (TREE / "mkdocs.yml").read_text()
    for page in PAGES:
        assert page in menu
    recipes = [path.name for path in (TREE / "docs" / "recipes").glob("*.md")]
    assert all(f"recipes/{name}" in menu for name in recipes)
    for path in [TREE / "README.md", *(TREE / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
            assert (path.parent / link).exists(), f"{path.name} links to {link}"
