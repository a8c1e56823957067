"""RoBERTa's tensors by their names in Hugging Face's checkpoints."""

_LAYER = 'roberta.encoder.layer.{layer}'
_EMBEDDINGS = 'roberta.embeddings'


def _dense_rows(ours, theirs):
  return (
    (f'{ours}/kernel', f'{theirs}.weight', True),
    (f'{ours}/bias', f'{theirs}.bias', False),
  )


def _norm_rows(ours, theirs):
  return (
    (f'{ours}/scale', f'{theirs}.weight', False),
    (f'{ours}/bias', f'{theirs}.bias', False),
  )


HF_ENCODER_TENSORS: tuple[tuple[str, str, bool], ...] = (
  ('embed/tokens/embedding', f'{_EMBEDDINGS}.word_embeddings.weight', False),
  (
    'embed/positions/embedding',
    f'{_EMBEDDINGS}.position_embeddings.weight',
    False,
  ),
  (
    'embed/types/embedding',
    f'{_EMBEDDINGS}.token_type_embeddings.weight',
    False,
  ),
  *_norm_rows('embed/norm', f'{_EMBEDDINGS}.LayerNorm'),
  *_dense_rows('layers/attn/q_proj', f'{_LAYER}.attention.self.query'),
  *_dense_rows('layers/attn/k_proj', f'{_LAYER}.attention.self.key'),
  *_dense_rows('layers/attn/v_proj', f'{_LAYER}.attention.self.value'),
  *_dense_rows('layers/attn/o_proj', f'{_LAYER}.attention.output.dense'),
  *_norm_rows('layers/attn_norm', f'{_LAYER}.attention.output.LayerNorm'),
  *_dense_rows('layers/mlp/up_proj', f'{_LAYER}.intermediate.dense'),
  *_dense_rows('layers/mlp/down_proj', f'{_LAYER}.output.dense'),
  *_norm_rows('layers/mlp_norm', f'{_LAYER}.output.LayerNorm'),
)
"""Our path, Hugging Face's name, whether the matrix is transposed there."""

HF_TENSORS: tuple[tuple[str, str, bool], ...] = (
  *HF_ENCODER_TENSORS,
  *_dense_rows('lm_head/dense', 'lm_head.dense'),
  *_norm_rows('lm_head/norm', 'lm_head.layer_norm'),
  ('lm_head/bias', 'lm_head.bias', False),
  # Copies of what is tied, which some checkpoints hold as well.
  ('embed/tokens/embedding', 'lm_head.decoder.weight', False),
  ('lm_head/bias', 'lm_head.decoder.bias', False),
)
"""The same with the head of `RobertaForMaskedLM`."""

HF_CLASSIFIER_TENSORS: tuple[tuple[str, str, bool], ...] = (
  *HF_ENCODER_TENSORS,
  *_dense_rows('classifier/dense', 'classifier.dense'),
  *_dense_rows('classifier/out', 'classifier.out_proj'),
)
"""The same with the head of `RobertaForSequenceClassification`."""

HF_UNREAD = r'(roberta\.)?(pooler\..*|embeddings\.(position|token_type)_ids)'
"""What a checkpoint may hold beside the model, for `hf.load_params`: the pooler
of `RobertaModel` and buffers of early versions of transformers."""
