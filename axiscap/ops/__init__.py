"""The ops: activation capping of the rows of a residual stream (arXiv 2601.10387, eq. 1), in fused kernels.

For a row x and its slot's directions k, in order, in float32: ``p = <x, v_k>; if p < tau_k: x += (t_k - p) * u_k``.
Without targets ``t`` is the floor ``tau``, and without lifts ``u`` is the axis ``v``: the paper's equation. A row in
which no direction fires is not written. Three kinds of rows are left as they are, with projections NaN: a row whose
projection is not finite, a row whose norm is larger than its limit, and a row whose correction would leave the range of
its dtype. The result of a row depends on its own bits, H, the dtype and the slot alone.

Arguments that the ops share:

- hidden: (..., H), float32, bfloat16 or float16; last stride 1, rows with one uniform stride. ``rows`` below is the
  product of the leading dimensions.
- axes: (S, K, H) float32, contiguous, unit length. floors: (S, K) float32, in the units of the projection; ``-inf``
  switches a direction off.
- slots: (rows,) int32, the bank's slot of each row; -1 leaves a row alone (its projections are NaN). None: slot 0.
- targets: like floors, and at least them; the projection that a row below its floor gets. None: the floors.
- lifts: like axes; a row is read along its axis and corrected along its lift. ``<axis, lift>`` is 1, so that the
  reading ends on the target, or a strength between 0 and 1; elements are below 2^60. None: the axes.
- norm_limits: (S,) float32, positive; a row whose squares add up to more than ``norm_limit^2``, in float32, is left
  alone: an attention sink. None, or inf: no limit.
- projections: (rows, K) float32, filled with ``<row, v_k>`` before the cap.

All on one device. A tensor that an op changes shares no memory with the others. Errors, before anything is changed:
TypeError for a dtype, ValueError for a shape, stride, device, shared memory, or a tensor that is changed and requires
grad, IndexError for a slot outside [0, S) other than -1 (on CPU; an accelerator leaves that row alone and reports NaN),
NotImplementedError for forward-mode derivatives. Unit length is the caller's promise; ``axiscap.install`` checks it.

The functions call the kernels directly. Under ``torch.compile`` and ``torch.export`` they become
``torch.ops.axiscap.*``, which run the same code from torch's dispatcher. The overloads ``buffers``, such as
``torch.ops.axiscap.cap_.buffers(hidden, axes, floors, slots, projections, targets, lifts, norm_limits)``, are for
graphs that keep slots and projections at fixed addresses. Both buffers may be longer than the step, and begin with its
rows.
"""

from axiscap.ops.library import (
    accumulate_,
    add_rms_norm_cap_,
    add_rms_norm_cap_fp8_,
    cap,
    cap_,
    cap_layers_,
    cap_residual_,
    new_stats,
    project,
)

__all__ = [
    "accumulate_",
    "add_rms_norm_cap_",
    "add_rms_norm_cap_fp8_",
    "cap",
    "cap_",
    "cap_layers_",
    "cap_residual_",
    "new_stats",
    "project",
]
