"""The search distributions: K categorical distributions learnt from one stream of evaluations. Pure NumPy.

Sources: Noda, Saito, Shirakawa, *Efficient Search of Multiple Neural Architectures with Different
Complexities via Importance Sampling*, ICANN 2022, arXiv 2207.10334 (our reading of its abstract); Akimoto et
al., *Adaptive Stochastic Natural Gradient Method for One-Shot Neural Architecture Search*, ICML 2019, arXiv
1905.08537 (ASNG).

Notation of this package
------------------------
::

    K  k        profiles, each with one distribution            D  d     decisions
    C_d         candidates of decision d that a profile allows  C  j     max C_d; arrays are padded to it
    n  i        architectures of one step                       N        pooled samples (of several steps)
    M  m        metrics with a cost table                       R_m(c)   cost by metric m      B_m  its cap

    choices     (n, D) int64        one candidate index per decision: the architectures c_i
    mask        (D, C) bool         what a profile allows; False in the padding
    theta, θ    (D, C) float64      p_k(c) = Π_d θ_k[d, c_d]; 0 outside the mask; (K, D, C) for all
    T(c)        (D, C)              c as one-hot
    L(c)        validation loss     f_k(c) = L(c) + Σ_m coefficient_km R_m(c) / reference_km, lower is better
    α_k         (K,)                mixture shares; q(c) = Σ_k α_k p_k(c)
    w_k(c)      p_k(c) / q(c)       importance weight, in [0, 1/α_k];  ESS_k = (Σw)² / Σw²
    u_i         utility             higher is better, sums to 0, importance weight inside
    L̂(c)        model of the loss   t_k in [0, 1]: how far profile k trusts it;  R²: what it explains of new samples
    F           free draws of p_k   they are not evaluated, so their number costs nothing but arithmetic
    n_θ         Σ_d (C_d - 1)       free parameters
    δ, Δ, β, s, γ                   ASNG's step length, its divisor, its averaging rate and its two averages

The generator is always an argument; the caller owns the loop (``ask``, ``tell``).
"""
