"""LLaMA-7b with the GaLore protocol on C4, on one GPU of 16 GB: INT8 weights.

Command:
  XLA_PYTHON_CLIENT_MEM_FRACTION=0.96 \
  python train_lm.py --config configs/llama_7b_16gb.py \
    --data.source 'C4/*.json.gz' \
    --data.validation-source C4_VALIDATION.json.gz \
    --data.tokenizer T5_FOLDER

What it takes:
  python -m gnlorp_jax.plan --config configs/llama_7b_16gb.py \
    --device rtx4060ti

As llama_7b_24gb.py, with the kernels of the blocks in 8 bits, rounded
stochastically, and bases in 4 bits. --step.offload keeps the inputs of the
blocks in the host's memory, which saves another GiB. It has not been run yet;
benchmarks/gpu_layerwise.sh measures its memory and its first steps.
"""

import dataclasses

from gnlorp_jax.configs import llama_7b_24gb

config = dataclasses.replace(
  llama_7b_24gb.config,
  run_dir='runs/llama_7b_16gb',
  optim=dataclasses.replace(
    llama_7b_24gb.config.optim, basis_bits=4, stochastic_rounding=False
  ),
  step=dataclasses.replace(llama_7b_24gb.config.step, weight_bits=8),
)
