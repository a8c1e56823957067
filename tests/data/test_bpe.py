from gnlorp_jax.data import bpe


def test_training_reads_no_more_than_its_share(monkeypatch):
  monkeypatch.setattr(bpe, 'CHARACTERS', 5)
  texts = iter(['abc', 'defg', 'never reached'])
  trained = bpe.train(texts, 300, ['<end>'])
  assert next(texts) == 'never reached'
  assert trained.encode('ab').ids and trained.token_to_id('<end>') == 0
