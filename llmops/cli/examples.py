"""Examples below each verb's ``--help``. All are parsed by the tests, and their configurations composed."""

from __future__ import annotations

EXAMPLES = {
    "submit": """\
  llmops submit recipe=tiny --follow
  llmops submit model=1b dist=fsdp train.lr=1e-4 --name baseline
  llmops submit --backend slurm recipe=tiny cluster.partition=gpu
  llmops submit --backend slurm cluster.nodes=2 -- python train.py --lr 3e-4
""",
    "plan": """\
  llmops plan model=7b hardware=h100 cluster.ranks_per_node=8 dist=fsdp
  llmops plan model=7b hardware=h100 cluster.ranks_per_node=8 dist=fsdp --search
""",
    "render": """\
  llmops render --backend slurm recipe=tiny cluster.partition=gpu
""",
    "status": """\
  llmops status
  llmops status baseline
  llmops status --state running,pending --user me --watch
  llmops status --sweep lr-grid --json
""",
    "top": """\
  llmops top
""",
    "dashboard": """\
  llmops dashboard --port 8265
""",
    "logs": """\
  llmops logs -f
  llmops logs baseline --rank 0 --tail 50
  llmops logs baseline --errors
  llmops logs baseline --since 2h --grep 'loss|error'
""",
    "goodput": """\
  llmops goodput baseline
  llmops goodput --by user --since 7d --price 2.5
""",
    "resume": """\
  llmops resume baseline --follow
  llmops resume baseline train.max_steps=400
  llmops resume baseline --backend slurm cluster.partition=gpu
""",
    "cancel": """\
  llmops cancel baseline
  llmops cancel --graceful baseline lr-grid
""",
    "sweep": """\
  llmops sweep recipe=tiny train.lr=1e-3,3e-3 'train.seed=range(0,4)'
  llmops sweep recipe=tiny sweep=tpe 'train.lr=interval(1e-4,1e-2)' --trials 20
""",
    "sweep status": """\
  llmops sweep status lr-grid
""",
    "sweep report": """\
  llmops sweep report lr-grid
  llmops sweep report lr-grid --html report.html
""",
    "sweep best": """\
  llmops sweep best lr-grid --as-overrides
""",
    "sweep resume": """\
  llmops sweep resume lr-grid --trials 8
""",
    "metrics": """\
  llmops metrics --port 9464
  llmops metrics --once
""",
    "ckpt": """\
  llmops ckpt ls baseline
  llmops ckpt verify baseline
  llmops ckpt gc baseline --keep-last 3 --yes
""",
    "ckpt ls": """\
  llmops ckpt ls baseline
""",
    "ckpt show": """\
  llmops ckpt show baseline
  llmops ckpt show baseline@400 --all
""",
    "ckpt verify": """\
  llmops ckpt verify baseline --all
""",
    "ckpt diff": """\
  llmops ckpt diff baseline@200 @400
  llmops ckpt diff baseline@400 clone@400 --values
""",
    "ckpt gc": """\
  llmops ckpt gc baseline --keep-last 3 --keep-every 1000
  llmops ckpt gc baseline --keep-best evaluation_loss:min --yes
""",
    "ckpt rm": """\
  llmops ckpt rm baseline@200 --yes
""",
    "ckpt tag": """\
  llmops ckpt tag baseline@400 released
  llmops ckpt tag baseline released --delete
""",
    "ckpt import": """\
  llmops ckpt import ./llama-hf runs/from-llama --step 0
""",
    "ckpt export": """\
  llmops ckpt export baseline ./baseline-hf --format hf
""",
    "ckpt save": """\
  llmops ckpt save baseline
""",
    "diff": """\
  llmops diff baseline baseline-clone
  llmops diff baseline lr-grid/3 --json
""",
    "clone": """\
  llmops clone baseline train.lr=1e-4
  llmops clone baseline model=7b --name larger --dry-run
  llmops clone baseline --code --follow
""",
    "schema": """\
  llmops schema model
  llmops schema --all .llmops-schemas
""",
    "completion": """\
  source <(llmops completion bash)
  source <(llmops completion zsh)
  llmops completion fish > ~/.config/fish/completions/llmops.fish
""",
    "init": """\
  llmops init
  llmops init --backend k8s --output conf/cluster/team.yaml
""",
    "doctor": """\
  llmops doctor
  llmops doctor --backend slurm --runs-url s3://bucket/runs --json
""",
}
