"""out_i = Σ_j softmax_j(scale·q_i·k_j) v_j over the keys j whose interval holds i. See README.md."""
