"""Sums up what tests took: durations.py REPORT.xml FILE.json.

The report is the one of pytest's --junitxml. The file, which is committed, has
whole seconds by file, so that growth is seen, and seconds by test of those that
took longer than `SLOW`. The root conftest.py reads it: several processes begin
with the longest files, and the tests it names are slow.
"""

import collections
import json
import pathlib
import sys
import xml.etree.ElementTree as ElementTree

SLOW = 0.5  # Seconds.


def main() -> None:
  """Reads the report and writes the file."""
  report, file = map(pathlib.Path, sys.argv[1:])
  files: dict[str, float] = collections.defaultdict(float)
  tests: dict[str, float] = {}
  for case in ElementTree.parse(report).iter('testcase'):
    path = case.get('classname', '').replace('.', '/') + '.py'
    seconds = float(case.get('time', 0))
    files[path] += seconds
    if seconds > SLOW:
      tests[f'{path}::{case.get("name")}'] = round(seconds, 1)
  longest_first = sorted(files.items(), key=lambda item: (-item[1], item[0]))
  found = {
    'files': {path: round(seconds) for path, seconds in longest_first},
    'slow tests': dict(sorted(tests.items())),
  }
  file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + '\n')


if __name__ == '__main__':
  main()
