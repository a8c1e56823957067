r"""Scores by a plain loop in PyTorch: one option at a time, nothing batched.

It shares no code with the package: it reads the files itself, writes the
prompts itself, and leaves tokens and model to transformers. As a program it
writes what it found into a JSON file, which `test_smollm2.py` compares with:

  python tests/recipes/evaluate/plain_torch.py MODEL choices --limit 500 \
    --data ../shared/data/sft/commonsense_llm_adapters --output choices.json
  python tests/recipes/evaluate/plain_torch.py MODEL text --window 1024 \
    --data wiki.test.tokens --output text.json
"""

import argparse
import json
import pathlib
import re
import time

import torch
import transformers

# File, and how a question is put to the model.
TASKS = {
  'arc_easy': ('ARC-Easy.test.json', 'Question: {}\nAnswer:'),
  'openbookqa': ('openbookqa.test.json', '{}'),
  'piqa': ('piqa.test.json', 'Question: {}\nAnswer:'),
}


def questions(name, data, limit):
  """Triples of a context, the options and the index of the right one."""
  file, prompt = TASKS[name]
  found = []
  for row in json.loads((data / file).read_text())[:limit]:
    asked = row['instruction'].split(' to the question: ', 1)[1]
    asked = asked.rsplit('\n\n', 1)[0]  # Without the format of the answer.
    question, *options = re.split(r'(?:Answer|Solution)[1-5]: ', asked)
    question = question.removesuffix('\n\n')
    options = [option.strip() for option in options]
    right = int(re.search(r'\d', row['answer'])[0]) - 1
    found.append((prompt.format(question), options, right))
  return found


@torch.inference_mode()
def log_likelihood(model, context, continuation):
  """Of one continuation, token ids both, in float64 from float32 logits."""
  ids = torch.tensor([context + continuation])
  logits = model(ids[:, :-1]).logits[0, -len(continuation) :]
  target = torch.tensor(continuation)
  greedy = bool((logits.argmax(dim=-1) == target).all())
  chosen = logits.double().log_softmax(dim=-1).gather(1, target[:, None])
  return float(chosen.sum()), greedy


def choices(model, tokenizer, name, data, limit):
  """Per question the log-likelihoods of its options, and what they say."""
  rows = []
  for context, options, right in questions(name, data, limit):
    context_ids = tokenizer(context)['input_ids']
    values = [
      log_likelihood(
        model,
        context_ids,
        tokenizer(f'{context} {option}')['input_ids'][len(context_ids) :],
      )[0]
      for option in options
    ]
    per_character = [
      value / len(option) for value, option in zip(values, options, strict=True)
    ]
    rows.append(
      {
        'context': context,
        'options': options,
        'log_likelihoods': values,
        'acc': values.index(max(values)) == right,
        'acc_norm': per_character.index(max(per_character)) == right,
      }
    )
  return rows


def text(model, tokenizer, path, window, start):
  """The log-likelihood of a text: windows side by side, the last one full."""
  ids = [start, *tokenizer(path.read_text(encoding='utf-8'))['input_ids']]
  done, total = 1, 0.0
  while done < len(ids):
    end = min(done + window, len(ids))
    first = max(0, end - window - 1)
    total += log_likelihood(model, ids[first:done], ids[done:end])[0]
    done = end
  return {'log_likelihood': total, 'tokens': len(ids) - 1, 'window': window}


def load(folder):
  """A model in float32 and its tokenizer."""
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32
  )
  return model.eval(), tokenizer


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('model')
  parser.add_argument('what', choices=('choices', 'text'))
  parser.add_argument('--data', type=pathlib.Path, required=True)
  parser.add_argument('--limit', type=int, default=500)
  parser.add_argument('--window', type=int, default=1024)
  parser.add_argument('--output', type=pathlib.Path, required=True)
  args = parser.parse_args()
  model, tokenizer = load(args.model)
  begin = time.perf_counter()
  if args.what == 'text':
    start = tokenizer.bos_token_id
    found = text(model, tokenizer, args.data, args.window, start)
  else:
    found = {
      name: choices(model, tokenizer, name, args.data, args.limit)
      for name in TASKS
    }
  found['seconds'] = time.perf_counter() - begin
  args.output.write_text(json.dumps(found, indent=1) + '\n')


if __name__ == '__main__':
  main()
