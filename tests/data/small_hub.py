"""A Hugging Face hub on loopback, as far as downloads ask for one."""

import contextlib
import hashlib
import http.server
import json
import re
import threading
import urllib.parse

from huggingface_hub import constants

from gnlorp_jax.data import hub

_PATH = re.compile(
  r'/(?P<api>api/models/|api/datasets/|datasets/|)'
  r'(?P<repository>[\w.-]+/[\w.-]+)'
  r'(?:/(?P<verb>revision|tree|resolve|paths-info)/(?P<revision>[^/]+))?'
  r'(?:/(?P<file>.+))?'
)


class SmallHub:
  """Repositories, what was asked for, and how the hub misbehaves.

  Attributes:
    url: Where it is served.
    repositories: Per (kind, name), per revision, the files.
    private: Per name, the token that opens it.
    gated: Names of what shows its files to nobody.
    ill: Whether every answer is that of a server at fault.
    requests: Method, path and authorization of each request.
    ranges: Parts of files that were asked for.
    breaks: Per name of a file, the byte at which it breaks off, as often as a
      list has bytes.
  """

  def __init__(self):
    self.url = ''
    self.repositories = {}
    self.private = {}
    self.gated = set()
    self.ill = False
    self.requests = []
    self.ranges = []
    self.breaks = {}

  def add(self, name, files, revision='main', kind='models'):
    """Puts a commit at the head of a branch; returns its 40 digits."""
    files = {'.gitattributes': b'', **files}
    digest = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
    revisions = self.repositories.setdefault((kind, name), {})
    revisions[revision] = revisions[digest] = digest, files
    return digest

  def paths(self, method=None):
    """What was asked for, in order."""
    return [path for m, path, _ in self.requests if method in (None, m)]

  def downloads(self):
    """Names of the files that were fetched, in order of the alphabet."""
    paths = self.paths('GET')
    return sorted(p.rsplit('/')[-1] for p in paths if '/resolve/' in p)


@contextlib.contextmanager
def serve(hub):
  """Runs a hub in a thread; yields its address."""

  class Handler(_Handler):
    pass

  Handler.hub = hub
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  server.daemon_threads = True
  thread = threading.Thread(
    target=server.serve_forever, kwargs={'poll_interval': 0.01}
  )
  thread.start()
  try:
    yield f'http://127.0.0.1:{server.server_port}'
  finally:
    server.shutdown()
    server.server_close()
    thread.join()


@contextlib.contextmanager
def connected(folder, monkeypatch):
  """A hub that the library knows, its cache in a folder, without token."""
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(folder / 'cache'))
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
  monkeypatch.setattr(constants, 'HF_TOKEN_PATH', str(folder / 'token'))
  monkeypatch.delenv('HF_TOKEN', raising=False)
  monkeypatch.setattr('time.sleep', lambda seconds: None)  # Between retries.
  hub._commit.cache_clear()
  served = SmallHub()
  with serve(served) as served.url:
    monkeypatch.setenv('HF_ENDPOINT', served.url)
    yield served
  hub._commit.cache_clear()


class _Handler(http.server.BaseHTTPRequestHandler):
  def log_message(self, *args):
    pass

  def do_HEAD(self):
    self._answer()

  def do_GET(self):
    self._answer()

  def do_POST(self):
    size = int(self.headers.get('Content-Length', 0))
    self.form = urllib.parse.parse_qs(self.rfile.read(size).decode())
    self._answer()

  def _answer(self):
    url = urllib.parse.urlsplit(self.path)
    if url.path == '/api/agent-harnesses':  # An affair of the library's own.
      return self._refuse(404, 'EntryNotFound')
    token = self.headers.get('Authorization')
    self.hub.requests.append((self.command, self.path, token))
    if self.hub.ill:
      return self._refuse(500, 'Ill')
    match = _PATH.fullmatch(url.path)
    kind = 'datasets' if match and 'datasets' in match['api'] else 'models'
    name = match and match['repository']
    found = self.hub.repositories.get((kind, name))
    if found is None:
      return self._refuse(404, 'RepoNotFound')
    if name in self.hub.private and (
      token != f'Bearer {self.hub.private[name]}'
    ):
      return self._refuse(401, 'RepoNotFound')
    if (
      name in self.hub.gated
      and match['verb'] == 'resolve'
      and (match['file'] != '.gitattributes')
    ):
      return self._refuse(403, 'GatedRepo')
    revision = urllib.parse.unquote(match['revision'] or 'main')
    if revision not in found:
      return self._refuse(404, 'RevisionNotFound')
    commit, files = found[revision]
    if match['verb'] in (None, 'revision'):
      siblings = [{'rfilename': path} for path in files]
      return self._json({'id': name, 'sha': commit, 'siblings': siblings})
    if match['verb'] == 'tree':
      is_deep = 'recursive=true' in url.query.lower()
      return self._json(_tree(files, match['file'], is_deep))
    if match['verb'] == 'paths-info':
      return self._json(
        [_entry(p, files[p]) for p in self.form['paths'] if p in files]
      )
    path = urllib.parse.unquote(match['file'])
    if path not in files:
      return self._refuse(404, 'EntryNotFound', commit)
    return self._file(path, files[path], commit)

  def _refuse(self, status, code, commit=None):
    self.send_response(status)
    self.send_header('X-Error-Code', code)
    if commit:
      self.send_header('X-Repo-Commit', commit)
    self.send_header('Content-Length', '0')
    self.end_headers()

  def _json(self, value):
    body = json.dumps(value).encode()
    self.send_response(200)
    self.send_header('Content-Type', 'application/json')
    self.send_header('Content-Length', str(len(body)))
    self.end_headers()
    self.wfile.write(body)

  def _file(self, path, content, commit):
    span = self.headers.get('Range', '')
    self.hub.ranges += [span] * (self.command == 'GET' and span != '')
    start = re.fullmatch(r'bytes=(\d+)-(\d*)', span)
    begin = int(start[1]) if start else 0
    end = int(start[2]) + 1 if start and start[2] else len(content)
    body = content[begin:end]
    self.send_response(206 if start else 200)
    self.send_header('ETag', f'"{hashlib.sha1(content).hexdigest()}"')
    self.send_header('X-Repo-Commit', commit)
    self.send_header('Accept-Ranges', 'bytes')
    self.send_header('Content-Length', str(len(body)))
    if start:
      span = f'bytes {begin}-{begin + len(body) - 1}/{len(content)}'
      self.send_header('Content-Range', span)
    self.end_headers()
    if self.command == 'HEAD':
      return
    if self.hub.breaks.get(path):
      body = body[: max(self.hub.breaks[path].pop(0) - begin, 0)]
    self.wfile.write(body)


def _tree(files, folder, is_deep):
  """What lies in a folder, and with `is_deep` below it."""
  under = f'{folder}/' if folder else ''
  entries = {}
  for path, content in files.items():
    if not path.startswith(under):
      continue
    inner = path.removeprefix(under)
    if '/' not in inner or is_deep:
      entries[path] = _entry(path, content)
    else:
      path = under + inner.partition('/')[0]
      entries[path] = {'type': 'directory', 'path': path, 'oid': '0' * 40}
  return list(entries.values())


def _entry(path, content):
  return {
    'type': 'file',
    'path': path,
    'size': len(content),
    'oid': hashlib.sha1(content).hexdigest(),
  }
