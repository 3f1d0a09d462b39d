"""The paper's tables, figures and claims beside ours, from several seeds of the whole recipe table.

How several seeds become one number, and when a claim counts as reproduced:

- Every seed asks the same questions. A question's value is its mean over the seeds; an average counts the
  data sets alike, as the paper's does; its interval is a 95 % bootstrap over questions, stratified by data
  set.
- That interval says how far the result could move with other questions, for the models at hand. It says
  nothing about another training seed. So each seed's own mean stands beside every number, and a claim holds
  only when the interval lies on the claimed side *and* every seed's own mean does. Where there is no effect,
  k seeds agree with the claim by chance once in 2 to the power of k: few seeds prove little.
- A claim of the kind "on at least k of n data sets" takes its intervals at the level 1 - 0.05 / (n - k + 1)
  (partial conjunction with Bonferroni's correction, Benjamini and Heller 2008, Biometrics 64): with seven
  data sets one is above by chance more often than one in twenty times. "All of them" needs no correction.
- Claims are not corrected for being many: of fifty, some intervals miss by chance.
- Claims about training ask for the same in every seed (see `stability`).
"""
