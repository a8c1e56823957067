# %% [markdown]
# # Several hosts
#
# One process drives all GPUs of a host, with no option at all. GPUs of several hosts are driven by several
# processes, all of which get the same command: one for each host by hand, one for each GPU under Slurm, whose `srun`
# tells the processes where they are:
#
# ```bash
# srun --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 \
#   gnlorp-train-lm --config llama_1b --data.source 'c4/*.json.gz' --run-dir /shared/runs/mine
# ```
#
# By hand each is told the address of the first, how many there are, and its number:
#
# ```bash
# gnlorp-train-lm --config llama_1b --data.source 'c4/*.json.gz' --run-dir /shared/runs/mine \
#   --processes.coordinator-address 10.0.0.1:4321 \
#   --processes.num-processes 2 --processes.process-id 0
# ```
#
# This page starts two processes on one machine, each with two pretended devices. That is also the way to
# try a command before it waits in a queue.
#
# ## Two processes
#
# The run directory must be on a disk that all of them see. `--batch-size` counts the sequences of all together;
# `--mesh.data 4` copies the model to the four devices, each of which computes a quarter of the batch.

# %%
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile

folder = pathlib.Path(tempfile.mkdtemp())
with socket.socket() as free:
  free.bind(('localhost', 0))
  port = free.getsockname()[1]
command = [
  *(sys.executable, '-m', 'gnlorp_jax.train_lm'),
  *('--data.source', str(pathlib.Path(json.__file__).parent)),
  *('--data.seq-len', '64', '--data.cache-dir', f'{folder}/cache'),
  *('--model.vocab-size', '512', '--model.hidden-size', '64'),
  *('--model.intermediate-size', '172', '--model.num-layers', '2'),
  *('--model.num-heads', '2', '--batch-size', '8', '--mesh.data', '4'),
  *('--optim.rank', '16', '--eval-every', '20', '--eval-batches', '2'),
]


def start(number, of, devices, *options):
  """Starts one of `of` processes, with so many pretended devices."""
  flag = f'--xla_force_host_platform_device_count={devices}'
  return subprocess.Popen(
    [
      *(*command, *options, '--run-dir', f'{folder}/run'),
      *('--processes.num-processes', str(of)),
      *('--processes.process-id', str(number)),
      *('--processes.coordinator-address', f'localhost:{port}'),
    ],
    env=os.environ | {'XLA_FLAGS': flag, 'JAX_PLATFORMS': 'cpu'},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def wait(processes):
  """Waits for the end of all; shows what each said at last."""
  for number, process in enumerate(processes):
    said = process.communicate()[0]
    print(f'process {number} ended with status {process.returncode}')
    print('\n'.join(said.splitlines()[-12:]))
    assert process.returncode == 0


wait([start(number, 2, 2, '--steps', '40') for number in (0, 1)])

# %% [markdown]
# Process 0 reports on the run; the others print only warnings and errors.
#
# ## On with another number of processes
#
# Checkpoints do not depend on how many processes wrote them. One process with four devices goes on with the
# same run, which is made longer here:

# %%
wait([start(0, 1, 4, '--steps', '60')])

# %% [markdown]
# ## When a host is lost
#
# The others notice after `--processes.heartbeat-seconds`, and end; the same command on whatever is left goes on
# from the last checkpoint. A signal to any process makes all of them save one and the same step. How devices are
# arranged, what launchers set, and all that may go wrong: [several processes](../several-processes.html).
