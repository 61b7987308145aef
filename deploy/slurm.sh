#!/usr/bin/env bash
# One measurement on Slurm: Ray comes up on the nodes of the job, `ray-probe run` runs on the first, Ray goes.
#
#   sbatch --nodes=2 deploy/slurm.sh configs/cluster_1p5b.yaml --out /shared/runs \
#     --set model.path=/shared/models/step-400 --set data.prompts=/shared/prompts.jsonl --set model.cache_dir=null
#   sbatch --nodes=2 deploy/slurm.sh --resume /shared/runs/NAME
#
# All arguments go to `ray-probe run`. Submit it from the installed working copy, on storage that all nodes see.
#SBATCH --job-name=ray-probe
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.log
# symmetric-run ends with `ray stop`, which ends every Ray of this user on the node: so no job beside this one.
#SBATCH --exclusive
set -euo pipefail

export PATH="$SLURM_SUBMIT_DIR/.venv/bin:$PATH"

# The token of this cluster, and the exit code: on shared storage, for this user alone, gone at the end.
umask 077
private=$(mktemp -d "$HOME/.ray-probe-$SLURM_JOB_ID-XXXXXX")
trap 'rm -rf "$private"' EXIT
python -c 'import secrets; print(secrets.token_hex(32))' >"$private/token"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$private/token"

# Ray's sessions are open to all users of a node, so they go below a directory that is not; a short path, for sockets.
export RAY_TMPDIR="/tmp/rp-$SLURM_JOB_ID"
# From a shared file system, Ray takes longer to import on many nodes than the 30 s that symmetric-run waits for them.
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300

# This script runs on the first node. An address of one of its interfaces, not its name, which may mean 127.0.1.1;
# where there are several networks, name the one to use.
head="$(hostname -I | cut -d' ' -f1):6379"
gpus=${SLURM_GPUS_ON_NODE:-0}
probe=(ray-probe run --address "$head")
if ((gpus > 0)); then
  probe+=(--actors "$((SLURM_NNODES * gpus))")
fi

# --wait: the other nodes' Ray notices late that the first one's has gone. The exit code goes through a file, because
# symmetric-run returns 0 when Ray does not start.
each_node=(srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --wait=30)
"${each_node[@]}" mkdir -p "$RAY_TMPDIR"
# shellcheck disable=SC2016  # expanded on the node
"${each_node[@]}" ray symmetric-run --address "$head" --min-nodes "$SLURM_NNODES" \
  --num-cpus="$SLURM_CPUS_ON_NODE" --num-gpus="$gpus" --disable-usage-stats -- \
  bash -c 'code=0; "${@:2}" || code=$?; echo "$code" >"$1"' run-probe "$private/exit-code" "${probe[@]}" "$@" || true
"${each_node[@]}" rm -rf "$RAY_TMPDIR"

if [[ ! -s "$private/exit-code" ]]; then
  echo "error: Ray did not come up on $SLURM_NNODES node(s) at $head; the reason is above" >&2
  exit 4
fi
exit "$(<"$private/exit-code")"
