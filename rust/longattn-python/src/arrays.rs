//! numpy arrays as views of the core: the one place that turns a Python object into a pointer.

use crate::errors::to_py;
use longattn::dense::Broadcast;
use longattn::tensor::{DType, TensorView, TensorViewMut};
use numpy::npyffi::flags::NPY_ARRAY_WRITEABLE;
use numpy::{PyArrayDescr, PyArrayDescrMethods, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use std::ffi::c_int;
use std::ops::Range;
use std::sync::OnceLock;

/// The dtype of the core that a numpy dtype is, if any. bfloat16 is ml_dtypes' type, known by its name.
pub(crate) fn dtype_of(descr: &Bound<'_, PyArrayDescr>) -> PyResult<Option<DType>> {
    // Numbers of types that were registered with numpy never change; asking for a name takes a microsecond.
    static BFLOAT16: OnceLock<c_int> = OnceLock::new();
    let found = match (descr.kind(), descr.itemsize()) {
        (b'f', 4) => Some(DType::F32),
        (b'f', 2) => Some(DType::F16),
        (_, 2) if BFLOAT16.get() == Some(&descr.num()) => Some(DType::BF16),
        (_, 2) => {
            let name: String = descr.getattr("name")?.extract()?;
            (name == "bfloat16").then(|| {
                BFLOAT16.get_or_init(|| descr.num());
                DType::BF16
            })
        }
        _ => None,
    };
    Ok(found.filter(|_| descr.is_native_byteorder() != Some(false)))
}

/// What numpy knows of an array, checked: pointer, shape and strides in elements.
struct Layout {
    data: *mut u8,
    shape: Vec<usize>,
    strides: Vec<isize>,
}

fn layout(name: &str, array: &Bound<'_, PyUntypedArray>) -> PyResult<Layout> {
    let size = array.dtype().itemsize();
    // SAFETY: the array object is alive, and its header is read under the GIL.
    let data = unsafe { (*array.as_array_ptr()).fields.data }.cast::<u8>();
    if !array.is_empty() && data.addr() % size.min(4) != 0 {
        return Err(PyValueError::new_err(format!(
            "{name}: got data at an unaligned address, expected alignment {size}"
        )));
    }
    let strides = array
        .strides()
        .iter()
        .zip(array.shape())
        .map(|(&bytes, &n)| match bytes % size as isize {
            _ if n <= 1 => Ok(0),
            0 => Ok(bytes / size as isize),
            _ => Err(PyValueError::new_err(format!(
                "{name}: got strides {:?}, expected multiples of {size}",
                array.strides()
            ))),
        })
        .collect::<PyResult<_>>()?;
    Ok(Layout { data, shape: array.shape().to_vec(), strides })
}

/// Shape and strides with `rank - len` axes of length 1 in front.
fn rank4(name: &str, layout: &Layout) -> PyResult<([usize; 4], [isize; 4])> {
    let rank = layout.shape.len();
    if rank != 4 && rank != 3 {
        return Err(PyValueError::new_err(format!("{name}: got shape {:?}, expected rank 3 or 4", layout.shape)));
    }
    let (mut shape, mut strides) = ([1; 4], [0; 4]);
    shape[4 - rank..].copy_from_slice(&layout.shape);
    strides[4 - rank..].copy_from_slice(&layout.strides);
    if shape[3] == 1 {
        strides[3] = 1;
    }
    Ok((shape, strides))
}

fn float_dtype(name: &str, array: &Bound<'_, PyUntypedArray>) -> PyResult<DType> {
    let descr = array.dtype();
    dtype_of(&descr)?.ok_or_else(|| {
        PyTypeError::new_err(format!("{name}: got dtype {descr}, expected float32, float16 or bfloat16"))
    })
}

/// A read-only view of a float array of rank 3 (batch 1) or 4.
pub(crate) fn view<'a>(name: &'static str, array: &'a Bound<'_, PyUntypedArray>) -> PyResult<TensorView<'a>> {
    let dtype = float_dtype(name, array)?;
    let layout = layout(name, array)?;
    let (shape, strides) = rank4(name, &layout)?;
    // SAFETY: numpy vouches for the memory of a live array; Python code that writes to it meanwhile races with us as with any
    // numpy function that releases the GIL.
    unsafe { TensorView::from_raw(name, layout.data, dtype, shape, strides) }.map_err(to_py)
}

/// A writable view of a float array of rank 3 (batch 1) or 4.
pub(crate) fn view_mut<'a>(name: &'static str, array: &'a Bound<'_, PyUntypedArray>) -> PyResult<TensorViewMut<'a>> {
    let dtype = float_dtype(name, array)?;
    let layout = layout(name, array)?;
    writeable(name, array)?;
    let (shape, strides) = rank4(name, &layout)?;
    // SAFETY: as in `view`, and the array is writable.
    unsafe { TensorViewMut::from_raw(name, layout.data, dtype, shape, strides) }.map_err(to_py)
}

/// A writable view `[B, H, L, 1]` of a contiguous float32 array `[B, H, L]` or `[H, L]`.
pub(crate) fn lse_view<'a>(name: &'static str, array: &'a Bound<'_, PyUntypedArray>) -> PyResult<TensorViewMut<'a>> {
    let layout = layout(name, array)?;
    writeable(name, array)?;
    if float_dtype(name, array)? != DType::F32 || !array.is_c_contiguous() || !(2..=3).contains(&layout.shape.len()) {
        return Err(PyValueError::new_err(format!("{name}: expected a contiguous float32 array of rank 2 or 3")));
    }
    let n = layout.shape.len();
    let shape = [if n == 3 { layout.shape[0] } else { 1 }, layout.shape[n - 2], layout.shape[n - 1], 1];
    let strides = [(shape[1] * shape[2]) as isize, shape[2] as isize, 1, 1];
    // SAFETY: as in `view_mut`.
    unsafe { TensorViewMut::from_raw(name, layout.data, DType::F32, shape, strides) }.map_err(to_py)
}

/// A view `[B, H, L, 1]` of numbers of rows, `[B, H, L]`, `[H, L]` or `[H]`, of any strides.
pub(crate) fn row_numbers<'a>(
    name: &'static str,
    array: &'a Bound<'_, PyUntypedArray>,
    [batch, heads, length, _]: [usize; 4],
) -> PyResult<TensorView<'a>> {
    let dtype = float_dtype(name, array)?;
    let layout = layout(name, array)?;
    let (shape, strides) = match (&layout.shape[..], &layout.strides[..]) {
        (&[h], &[s]) => ([batch, h, length, 1], [0, s, 0, 1]),
        (&[h, l], &[s, t]) => ([1, h, l, 1], [0, s, t, 1]),
        (&[b, h, l], &[r, s, t]) => ([b, h, l, 1], [r, s, t, 1]),
        (shape, _) => {
            let expected = [batch, heads, length];
            return Err(PyValueError::new_err(format!("{name}: got shape {shape:?}, expected {expected:?}")));
        }
    };
    // SAFETY: as in `view`.
    unsafe { TensorView::from_raw(name, layout.data, dtype, shape, strides) }.map_err(to_py)
}

/// The addresses between which an array lies; `None` where it has no elements.
fn memory(array: &Bound<'_, PyUntypedArray>) -> Option<Range<isize>> {
    // SAFETY: the array object is alive, and its header is read under the GIL.
    let data = unsafe { (*array.as_array_ptr()).fields.data }.addr() as isize;
    let (mut low, mut high) = (data, data + array.dtype().itemsize() as isize);
    for (&n, &stride) in array.shape().iter().zip(array.strides()) {
        let reach = (n as isize - 1) * stride;
        if n == 0 {
            return None;
        }
        if reach < 0 { low += reach } else { high += reach }
    }
    Some(low..high)
}

/// An error where an output may share memory with one of the other arrays.
pub(crate) fn check_apart<'a, 'py: 'a>(
    name: &str,
    out: &Bound<'py, PyUntypedArray>,
    others: impl IntoIterator<Item = (&'a str, Option<&'a Bound<'py, PyUntypedArray>>)>,
) -> PyResult<()> {
    let Some(own) = memory(out) else { return Ok(()) };
    for (other, array) in others {
        if let Some(range) = array.and_then(memory)
            && range.start < own.end
            && own.start < range.end
        {
            let text = format!("{name}: got an array that overlaps {other}, expected memory of its own");
            return Err(PyValueError::new_err(text));
        }
    }
    Ok(())
}

fn writeable(name: &str, array: &Bound<'_, PyUntypedArray>) -> PyResult<()> {
    // SAFETY: the array object is alive, and its header is read under the GIL.
    if unsafe { (*array.as_array_ptr()).fields.flags } & NPY_ARRAY_WRITEABLE != 0 {
        Ok(())
    } else {
        Err(PyValueError::new_err(format!("{name}: got a read-only array, expected a writable one")))
    }
}

/// A rank-4 array that may repeat along any axis; `kind` and `size` are numpy's kind letter and item size of `T`.
pub(crate) fn broadcast<'a, T>(
    name: &'static str,
    array: &'a Bound<'_, PyUntypedArray>,
    kind: u8,
) -> PyResult<Broadcast<'a, T>> {
    let descr = array.dtype();
    if descr.kind() != kind || descr.itemsize() != size_of::<T>() || descr.is_native_byteorder() == Some(false) {
        return Err(PyTypeError::new_err(format!("{name}: got dtype {descr}, expected the one it was converted to")));
    }
    let layout = layout(name, array)?;
    let (Ok(shape), Ok(strides)) = (<[usize; 4]>::try_from(layout.shape), <[isize; 4]>::try_from(layout.strides))
    else {
        return Err(PyValueError::new_err(format!("{name}: expected rank 4")));
    };
    // SAFETY: as in `view`; T is a plain number of the array's item size and alignment was checked.
    Ok(unsafe { Broadcast::from_raw(layout.data.cast_const().cast(), shape, strides) })
}
