"""What peft, transformers, TRL, axolotl and LLaMA-Factory call our options."""

NAMES: dict[str, tuple[str, ...]] = {
  'adapter.alpha': ('lora_alpha',),
  'adapter.dropout': ('lora_dropout',),
  'adapter.kind': ('use_dora', 'adapter_type', 'peft_type'),
  'adapter.init_from': ('adapter_name_or_path', 'lora_model_dir'),
  'adapter.rank': ('lora_r', 'lora_rank', 'r'),
  'adapter.rank_stabilized': ('use_rslora',),
  'adapter.rules': (
    'lora_target',
    'lora_target_modules',
    'target_modules',
  ),
  'batch_size': (
    'per_device_train_batch_size',
    'micro_batch_size',
    'train_batch_size',
  ),
  'checkpoint_every': ('save_steps',),
  'checkpoint_keep': ('save_total_limit',),
  'data.max_length': (
    'cutoff_len',
    'max_seq_len',
    'max_seq_length',
    'sequence_len',
  ),
  'data.packing': ('sample_packing',),
  'data.source': ('dataset', 'dataset_name', 'datasets', 'train_file'),
  'data.template': ('chat_template', 'prompt_template'),
  'data.train_on': (
    'assistant_only_loss',
    'completion_only_loss',
    'train_on_inputs',
  ),
  'data.val_size': ('val_set_size',),
  'data.validation_source': ('eval_dataset', 'validation_file'),
  'epochs': ('num_epochs', 'num_train_epochs'),
  'eval_every': ('eval_steps',),
  'init_from': (
    'base_model',
    'model_id',
    'model_name',
    'model_name_or_path',
  ),
  'log': ('report_to', 'wandb'),
  'log_every': ('logging_steps',),
  'method': ('finetuning_type', 'peft'),
  'micro_batches': (
    'gradient_accumulation_steps',
    'grad_accum',
  ),
  'model.compute_dtype': ('bf16', 'fp16', 'dtype', 'torch_dtype'),
  'model.remat': ('gradient_checkpointing',),
  'optim.clip_global_norm': ('max_grad_norm', 'grad_clip'),
  'optim.learning_rate': ('lr',),
  'optim.moment_bits': ('optim_bits',),
  'optim.name': ('optimizer', 'optim_type'),
  'optim.rank': ('galore_rank',),
  'optim.schedule': ('lr_scheduler', 'lr_scheduler_type'),
  'optim.scale': ('galore_scale',),
  'optim.update_proj_gap': ('galore_update_interval', 'update_interval'),
  'optim.warmup_fraction': ('warmup_ratio', 'warmup_steps'),
  'optim.weight_decay': ('wd',),
  'run_dir': ('output', 'output_dir', 'out_dir', 'save_dir'),
  'step.weight_bits': (
    'load_in_4bit',
    'load_in_8bit',
    'quantization',
    'quantization_bit',
    'quantize',
  ),
  'steps': ('max_steps', 'num_steps', 'iters', 'max_iters'),
}
"""Dotted fields, and the names that users of other programs may try."""

MEANING = {name: field for field, names in NAMES.items() for name in names}
"""The field that such a name is about."""
