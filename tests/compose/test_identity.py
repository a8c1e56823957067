"""Weights are what they hold, wherever they lie."""

import shutil

import pytest

from gnlorp_jax.compose import identity, parameters


def write(folder, weights='w', config='c'):
  folder.mkdir(parents=True)
  (folder / 'model.safetensors').write_text(weights)
  (folder / 'adapter_config.json').write_text(config)
  return str(folder)


def test_folder_is_known_by_its_weights(tmp_path, monkeypatch):
  found = identity.of_place(write(tmp_path / 'a'))
  assert found.startswith('folder with the fingerprint ')
  shutil.copytree(tmp_path / 'a', tmp_path / 'b' / 'other')
  (tmp_path / 'b' / 'other' / 'README.md').write_text('')
  monkeypatch.chdir(tmp_path / 'b')
  for place in ('other', 'other/', './other', f'{tmp_path}/b/other/'):
    assert identity.of_place(place) == found
  assert identity.of_place(write(tmp_path / 'c', weights='x')) != found
  assert identity.of_place(write(tmp_path / 'd', config='x')) != found


def test_what_is_no_folder_is_known_by_its_name(monkeypatch):
  monkeypatch.setattr(parameters, 'pinned', lambda place: f'{place}@commit')
  assert identity.of_place('hf:me/small') == 'hf:me/small@commit'
  assert identity.of_place('no such preset') == 'no such preset@commit'


@pytest.mark.parametrize('place', [None, '60m'])
def test_presets_and_nothing_stay(place):
  assert identity.of_place(place) == place


def test_settings_that_are_compared_tell_weights_by_what_they_are(tmp_path):
  place = write(tmp_path / 'a')
  found = identity.of_weights(
    {'init_from': place, 'seed': 0}, {'init_from': place, 'absent': place}
  )
  assert found == {'init_from': identity.of_place(place), 'seed': 0}
