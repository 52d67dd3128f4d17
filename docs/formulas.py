"""The formulas of lora.py, poly.py and mhr.py in LaTeX, for docs/annotate.py; nothing but data.

FORMULAS: a piece of text in a file's docstrings, and the same text with its formulas between $, in the code's letters.
EQUATIONS: a definition, the equation that it computes, in the paper's letters, and how its line in papers.md begins.
LETTERS: what is said above an equation with A and B, by the paper that its line in papers.md begins with.
NAMES: what is said below an equation of its other letters, by how its line in papers.md begins.
"""

ROUTING = {  # text that poly.py and mhr.py share: the same text with its formulas between $
    "(sum_j w_j A_j)(sum_j w_j B_j) is not sum_j w_j A_j B_j":
        r"$(\sum_j w_j A_j)(\sum_j w_j B_j)$ is not $\sum_j w_j A_j B_j$",
    "Phi = flatten(A B)": r"$\Phi = \mathrm{flatten}(A B)$",
    "products, sum_j w_j A_j B_j": r"products, $\sum_j w_j A_j B_j$",
    "Bernoulli(sigmoid(z))": r"$\mathrm{Bernoulli}(\sigma(z))$",
    "log[ sigmoid(z) u / ((1 - sigmoid(z)) (1 - u)) ] is z + logit(u)":
        r"$\log\,\frac{\sigma(z)\,u}{(1-\sigma(z))(1-u)}$ is $z + \mathrm{logit}(u)$",
}  # fmt: skip
FORMULAS = {
    "lora": {
        "y + scale * (x @ A) @ B for": r"$y + \mathit{scale}\,(x A) B$ for",
        "scale G B^T A^T for x": r"$\mathit{scale}\,G B^\top A^\top$ for x",
        "scale x^T G B^T for A": r"$\mathit{scale}\,x^\top G B^\top$ for A",
        "scale (x A)^T G for B": r"$\mathit{scale}\,(x A)^\top G$ for B",
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
        "w_j for skill j": "$w_j$ for skill $j$",
        "z^     a relaxed": r"$\hat z = \sigma((z + \mathrm{logit}\,u) / \tau)$, a relaxed",
        "w_j  = z^_j / sum_j' z^_j'": r"$w_j = \hat z_j / \sum_{j'} \hat z_{j'}$",
        "Phi  = sum_j w_j Phi_j": r"$\Phi = \sum_j w_j \Phi_j$",
        "with LoRA:  A = sum_j w_j A_j  and  B = sum_j w_j B_j":
            r"with LoRA: $A = \sum_j w_j A_j$ and $B = \sum_j w_j B_j$",
        "y    = the layer adapted by Phi": r"$y$ = the layer adapted by $\Phi$",
        "skills j of w_j Phi_j": r"skills $j$ of $w_j \Phi_j$",
    },
    "mhr": ROUTING | {
        "w_kj  = z^_kj / sum_j' z^_kj'": r"$w_{kj} = \hat z_{kj} / \sum_{j'} \hat z_{kj'}$",
        "(head k, skill j)": "(head $k$, skill $j$)",
        "z^ as in": r"$\hat z$ as in",
        "A[k]  = sum_j w_kj A_j[k]    (d, r), d = i/h": r"$A[k] = \sum_j w_{kj} A_j[k]$ (d, r), d = i/h",
        "A_j[k] is the k-th": "$A_j[k]$ is the $k$-th",
        "of rows of A_j": "of rows of $A_j$",
        "A     = concat(A[1], ..., A[h])    (i, r)": r"$A = \mathrm{concat}(A[1], \dots, A[h])$ (i, r)",
        "y     = the layer adapted by (A, B)": "$y$ = the layer adapted by $(A, B)$",
        "in head k the sum over the skills j of w_kj Phi_j[k]":
            r"in head $k$ the sum over the skills $j$ of $w_{kj} \Phi_j[k]$",
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
NAMES = {
    "MHR section 2.1, LoRA": r"$h$: the output, our $y$.",
    "Pol eq. 2": r"$i$: task, $j$: skill, $\tau$: temperature.",
    "Pol eq. 3": r"$i$: task; $j$: skill, $S_j$ under a sum; $\Phi_j$: its parameters; $\vartheta_i$: those of the "
    r"task; $\vartheta_0$: those that all tasks share, here the frozen backbone.",
    "Pol eq. 4": r"$x'$: the output, our $y$; $z$: the task's weights; $b_0$: the layer's bias.",
    "MHR section 2.2": r"$\tau$: task, $i$ and $j$: skill, $h$: the output, our $y$.",
    "MHR section 3 (MHR 2022 section 3.2)": r"$\tau$: task, $i$: skill; $*$: after pre-training.",
    "MHR section 3 (MHR 2022 section 3.3)": r"$\tau$: task, $j$: skill, $k$: head, of $h$ heads.",
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
