"""The formulas of lora.py, poly.py and mhr.py in LaTeX, for docs/annotate.py; nothing but data.

FORMULAS: a piece of text in a file's docstrings, and the same text with its formulas between $, in the code's letters.
EQUATIONS: a definition, the equation that it computes, in the paper's letters, and how its line in papers.md begins.
LETTERS: what is said above an equation with A and B, by the paper that its line in papers.md begins with.
"""

ROUTING = {  # text that poly.py and mhr.py share: the same text with its formulas between $
    "Bernoulli(sigmoid(z))": r"$\mathrm{Bernoulli}(\sigma(z))$",
    "log[ sigmoid(z) u / ((1 - sigmoid(z)) (1 - u)) ] is z + logit(u)":
        r"$\log\,\frac{\sigma(z)\,u}{(1-\sigma(z))(1-u)}$ is $z + \mathrm{logit}(u)$",
}  # fmt: skip
FORMULAS = {
    "lora": {
        "y = W0 x + alpha * A B^T x": r"$y = W_0 x + \alpha A B^\top x$",
        "here: (x A) B": "here: $(x A) B$",
        "MHR [2]: A B^T x": r"MHR [2]: $A B^\top x$",
        "Polytropon eq. 4: A B x": "Polytropon eq. 4: $A B x$",
        " B^T\n": " $B^\\top$\n",
        " A^T ": r" $A^\top$ ",
        "+-1/sqrt(3 i)": r"$\pm 1/\sqrt{3i}$",
        "+-sqrt(h/i)": r"$\pm\sqrt{h/i}$",
        "sqrt(3 h)": r"$\sqrt{3h}$",
        "y + scale (x A) B": r"$y + \mathit{scale}\,(x A) B$",
        "y = x W0^T + bias + (alpha / r) (x A) B": r"$y = x W_0^\top + \mathit{bias} + (\alpha / r)\,(x A) B$",
        "W0 + (alpha / r) (A B)^T": r"$W_0 + (\alpha / r)\,(A B)^\top$",
    },
    "poly": ROUTING | {
        "z^     a relaxed": r"$\hat z = \sigma((z + \mathrm{logit}\,u) / \tau)$, a relaxed",
        "w_s  = z^_s / sum_s' z^_s'": r"$w_s = \hat z_s / \sum_{s'} \hat z_{s'}$",
        "Phi  = sum_s w_s Phi_s": r"$\Phi = \sum_s w_s \Phi_s$",
        "with LoRA:  A = sum_s w_s A_s  and  B = sum_s w_s B_s":
            r"with LoRA: $A = \sum_s w_s A_s$ and $B = \sum_s w_s B_s$",
        "y    = the layer adapted by Phi": r"$y$ = the layer adapted by $\Phi$",
        "(sum w A)(sum w B) is not sum w (A B)": r"$(\sum w A)(\sum w B)$ is not $\sum w\,(A B)$",
        "Phi = flatten(A B)": r"$\Phi = \mathrm{flatten}(A B)$",
        " sum_s w_s A_s B_s": r" $\sum_s w_s A_s B_s$",
        "sum over s of w_s Phi_s": r"sum over s of $w_s \Phi_s$",
    },
    "mhr": ROUTING | {
        "w_hs  = z^_hs / sum_s' z^_hs'": r"$w_{hs} = \hat z_{hs} / \sum_{s'} \hat z_{hs'}$",
        "z^ as in": r"$\hat z$ as in",
        "A_h   = sum_s w_hs A_s[h]    (d, r), d = i/h": r"$A_h = \sum_s w_{hs} A_s[h]$ (d, r), d = i/h",
        "A_s[h] is the": "$A_s[h]$ is the",
        "of rows of A_s": "of rows of $A_s$",
        "A     = concat(A_1, ..., A_h)    (i, r)": r"$A = \mathrm{concat}(A_1, \dots, A_h)$ (i, r)",
        "y     = the layer adapted by (A, B)": "$y$ = the layer adapted by $(A, B)$",
        "sum over s of w_hs Phi_s[h]": r"sum over s of $w_{hs} \Phi_s[h]$",
    },
}  # fmt: skip
RELAXED = (
    r"\hat z_{i,j} = \sigma\left[\log\left(\frac{\sigma(z_{i,j})\,u}{(1-\sigma(z_{i,j}))(1-u)}\right)^{1/\tau}\right]"
    r"\\u \sim \mathrm{Uniform}(0, 1)"
)
AVERAGE = r"\vartheta_i = \vartheta_0 + \sum_{S_j} \Phi_j \frac{\hat z_{i,j}}{\sum_{S_j} \hat z_{i,j}}"
MEAN = r"A^\tau = \frac{1}{|\mathcal{S}|} \sum_i A_i^*"
LETTERS = {
    "MHR": r"In the paper's letters: its $A$ is our $B^\top$, its $B$ our $A$.",
    "Pol": r"In the paper's letters: its $A$ is our $B^\top$, its $B$ our $A^\top$.",
}
EQUATIONS = {  # definition: the equation in the paper's letters, how its line in papers.md begins
    "lora": {"LoRA.apply": (r"h = W_0 x + \alpha A B^\top x", "MHR section 2.1, LoRA")},
    "poly": {
        "relaxed_bernoulli": (RELAXED, "Pol eq. 2"),
        "soft_partition": (AVERAGE, "Pol eq. 3"),
        "PolyLinear": (r"x' = [W_0 + (z^\top A B)]\,x + b_0\\\Phi = \mathrm{flatten}(A B)", "Pol eq. 4"),
        "PolyLinear.mix": (
            r"A^\tau = \sum_i A_i \frac{\hat z_{\tau,i}}{\sum_j \hat z_{\tau,j}}\\"
            r"B^\tau = \sum_i B_i \frac{\hat z_{\tau,i}}{\sum_j \hat z_{\tau,j}}", "MHR section 2.2"),
        "PolyLinear.forward": (r"h = W_0 x + \alpha A^\tau (B^\tau)^\top x", "MHR section 2.2"),
        "PolyLinear.average_skills": (MEAN, "MHR section 3 (MHR 2022 section 3.2)"),
    },
    "mhr": {
        "relaxed_bernoulli": (RELAXED, "Pol eq. 2"),
        "soft_partition": (AVERAGE, "Pol eq. 3"),
        "MHRLinear.mix": (
            r"A_k^\tau = \sum_j A_j[k] \frac{\hat z_{\tau,j,k}}{\sum_j \hat z_{\tau,j,k}}\\"
            r"A^\tau = \mathrm{concat}(A_1^\tau, \dots, A_h^\tau)", "MHR section 3 (MHR 2022 section 3.3)"),
        "MHRLinear.average_skills": (MEAN, "MHR section 3 (MHR 2022 section 3.2)"),
    },
}  # fmt: skip
