"""Small graphs, and the recursion of their kernels written out node by node."""

import functools
import math

import mpmath
import numpy as np

from experiments.gntk import connected_graphs
from jaxattn.data import from_networkx


@functools.cache
def atlas(num, largest=7):
  """Connected graphs of 2 nodes or more, evenly from the atlas; degrees."""
  graphs = connected_graphs(largest)
  places = np.linspace(0, len(graphs) - 1, num).astype(int)
  return from_networkx([graphs[i] for i in places])


def literal_gntk(
  adjacencies, features, *, aggregate, layers, blocks, exact=False
):
  """(graph, graph) kernels by (number of blocks, jumping): sums over nodes.

  Everything is one loop inside another, and no matrix is multiplied; with 50
  digits if ``exact``.
  """
  number, layer_of = (mpmath.mpf, exact_relu) if exact else (float, relu)
  num = len(adjacencies)
  neighbors = [
    [[v for v in range(len(a)) if v == u or a[u, v]] for u in range(len(a))]
    for a in adjacencies
  ]

  def walk(i, j, variances):
    kernels, seen = {}, []
    nodes = [
      (u, v) for u in range(len(neighbors[i])) for v in range(len(neighbors[j]))
    ]
    cov = {
      (u, v): sum(number(x * y) for x, y in zip(features[i][u], features[j][v]))
      for u, v in nodes
    }
    jump, ntk = sum(cov.values()), cov
    for block in range(blocks):
      cov, ntk = (spread(i, j, nodes, values) for values in (cov, ntk))
      for layer in range(layers):
        if variances is None:
          seen.append([cov[u, u] for u in range(len(neighbors[i]))])
          var1 = var2 = seen[-1]
        else:
          step = block * layers + layer
          var1, var2 = variances[i][step], variances[j][step]
        new = {p: layer_of(cov[p], var1[p[0]], var2[p[1]]) for p in nodes}
        ntk = {p: ntk[p] * new[p][1] + new[p][0] for p in nodes}
        cov = {p: new[p][0] for p in nodes}
      total = sum(ntk.values())
      jump += total
      kernels[block + 1, False], kernels[block + 1, True] = total, jump
    return seen if variances is None else kernels

  def spread(i, j, nodes, values):
    out = {}
    for u, v in nodes:
      out[u, v] = sum(
        values[s, t] for s in neighbors[i][u] for t in neighbors[j][v]
      )
      if aggregate == "degree":
        out[u, v] /= len(neighbors[i][u]) * len(neighbors[j][v])
    return out

  tables = {}
  with mpmath.workdps(50):
    variances = [walk(i, i, None) for i in range(num)]
    for i in range(num):
      for j in range(i, num):
        for key, value in walk(i, j, variances).items():
          table = tables.setdefault(key, np.zeros((num, num)))
          table[i, j] = table[j, i] = float(value)
  return tables


def relu(cov, var1, var2):
  size = math.sqrt(var1 * var2)
  rho = min(1.0, max(-1.0, cov / size))
  # Nodes that look alike: the arccos of what rounding left is 1e-8, not 0.
  if 1 - rho * rho < 1e-14:
    rho = math.copysign(1.0, rho)
  angle = math.acos(rho)
  after = rho * (math.pi - angle) + math.sqrt(1 - rho * rho)
  return size * after / math.pi, (math.pi - angle) / math.pi


def exact_relu(cov, var1, var2):
  """The same of many digits: what rounding leaves is too small to matter."""
  size = mpmath.sqrt(var1 * var2)
  rho = min(mpmath.mpf(1), max(mpmath.mpf(-1), cov / size))
  angle = mpmath.acos(rho)
  after = rho * (mpmath.pi - angle) + mpmath.sqrt(1 - rho * rho)
  return size * after / mpmath.pi, (mpmath.pi - angle) / mpmath.pi
