# %% [markdown]
# # Several hosts
#
# On one host, one process drives all GPUs, and needs no option for it. To train on several hosts, start
# several processes, and give all of them the same command. Under Slurm there is one process for each GPU, and `srun`
# tells the processes how to find each other:
#
# ```bash
# srun --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 \
#   gnlorp-train-lm --config llama_1b --run-dir /shared/runs/mine --data.source 'c4/*.json.gz' \
#   --data.validation-source c4_validation.json.gz --data.tokenizer t5/
# ```
#
# Without Slurm, start one process on each host. Each is told the address of the first process, how many processes
# there are, and its own number:
#
# ```bash
# gnlorp-train-lm --config llama_1b --run-dir /shared/runs/mine --data.source 'c4/*.json.gz' \
#   --data.validation-source c4_validation.json.gz --data.tokenizer t5/ \
#   --processes.coordinator-address 10.0.0.1:4321 \
#   --processes.num-processes 2 --processes.process-id 0
# ```
#
# `c4/` and `c4_validation.json.gz` are texts of the C4 data set, and `t5/` is a folder with the tokenizer of T5. All
# hosts must find them. Without `--data.tokenizer` the program trains a tokenizer on the text, and without
# `--data.validation-source` it holds out the end of it.
#
# This page starts two processes on one machine, each with two pretended devices. In the same way you can
# try a command before it waits in a queue.
#
# ## Two processes
#
# The run directory must be on a disk that all processes see. `--batch-size` counts the sequences of all processes
# together. `--mesh.data 4` copies the model to the four devices, and each of these computes a quarter of the batch.

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
# Process 0 reports on the run. The others print only warnings and errors.
#
# ## Go on with another number of processes
#
# Checkpoints do not depend on how many processes wrote them. Here one process with four devices goes on with the
# same run, up to step 60:

# %%
wait([start(0, 1, 4, '--steps', '60')])

# %% [markdown]
# ## When a host is lost
#
# The other processes notice it after `--processes.heartbeat-seconds`, and end. Start the same command on the hosts
# that are left, with their number, and it goes on from the last checkpoint. If any process gets a signal (Ctrl-C or
# SIGTERM), all of them save the same step and end.
#
# Next: [use several processes](../several-processes.html) says what other launchers set, what the
# processes share, and how each kind of trouble ends.
