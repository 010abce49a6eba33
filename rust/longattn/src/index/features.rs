//! Sparse features of keys, by an autoencoder's weights, and the index of their inverted lists.
//!
//! ```text
//! z = W (x - centre) + bias                features of x: the largest of z, those above 0 only
//! score of a row = sum over features of (sum over queries of their activation) * idf * (row's activation)
//! ```

use super::postings::Postings;
use super::snapshot::{Parameters, Saved};
use super::{Ask, Followed, Grow, Grown, Index, Pick, Select, View, check_numbers, not_finite, numbers};
use crate::dense::matrix::{PackedMatrix, ROWS};
use crate::dense::rows::{Rows, Strided, widen_row};
use crate::dense::scratch::Buffer;
use crate::kv::{KvStore, Reader};
use crate::parallel::{Execution, map};
use crate::simd::{self, Isa, Kernel, Simd, dispatch};
use crate::tensor::{Element, Error, Result, TensorView, with_element};
use half::f16;
use std::any::Any;
use std::ops::Range;
use std::sync::Arc;

/// Rows that one item encodes.
const CHUNK: usize = 1024;
/// Rows from which on the weights are packed for the matrix kernel.
const MANY: usize = 32;

/// What makes features of rows.
#[derive(Clone, Debug)]
pub struct Encoder {
    /// `[heads or 1, features, dim]`.
    weights: Vec<f32>,
    /// `[heads or 1, features]`.
    bias: Vec<f32>,
    /// `[heads or 1, dim]`, subtracted first.
    centre: Vec<f32>,
    features: usize,
    dim: usize,
    /// Features of a row.
    top_k: usize,
    /// Whether only features above 0 count.
    relu: bool,
}

impl Encoder {
    /// From `weights` `[heads or 1, dim, features]`, `bias` `[heads or 1, features]` and `centre` `[heads or 1, dim]`.
    pub fn new(
        weights: &[f32],
        shape: [usize; 3],
        bias: Vec<f32>,
        centre: Vec<f32>,
        top_k: usize,
        relu: bool,
    ) -> Result<Self> {
        let [heads, dim, features] = shape;
        if weights.len() != heads * dim * features || bias.len() != heads * features || centre.len() != heads * dim {
            let got = format!("{} weights, {} biases and {} centres", weights.len(), bias.len(), centre.len());
            return Err(Error::value("w_enc", got, format!("those of {shape:?}")));
        }
        if heads == 0 || dim == 0 || features == 0 || features > u32::MAX as usize {
            return Err(Error::value("w_enc", format!("shape {shape:?}"), "no empty axis"));
        }
        if top_k == 0 || top_k > features {
            return Err(Error::value("top_k", top_k, format!("1 to {features}, the number of features")));
        }
        if ![weights, &bias, &centre].iter().all(|x| x.iter().all(|x| x.is_finite())) {
            return Err(Error::value("w_enc", "NaN or infinity in weights, bias or centre", "finite numbers"));
        }
        let mut turned = vec![0f32; weights.len()];
        for (to, from) in turned.chunks_exact_mut(dim * features).zip(weights.chunks_exact(dim * features)) {
            for (i, x) in from.iter().enumerate() {
                to[i % features * dim + i / features] = *x;
            }
        }
        Ok(Self { weights: turned, bias, centre, features, dim, top_k, relu })
    }

    /// Number of features there are.
    pub fn features(&self) -> usize {
        self.features
    }

    /// Features of a row.
    pub fn top_k(&self) -> usize {
        self.top_k
    }

    fn heads(&self) -> usize {
        self.centre.len() / self.dim
    }

    fn of_head<'a>(&self, all: &'a [f32], head: usize) -> &'a [f32] {
        let size = all.len() / self.heads();
        let at = if self.heads() == 1 { 0 } else { head };
        &all[at * size..(at + 1) * size]
    }

    fn nbytes(&self) -> usize {
        4 * (self.weights.len() + self.bias.len() + self.centre.len())
    }

    /// Features of the rows of `x` `[1, 1, rows, dim]`: `top_k` entries each, ascending by feature, those lacking with an activation
    /// of 0.
    pub fn encode(&self, x: &TensorView, execution: &Execution) -> Result<Vec<(u32, f32)>> {
        let [batch, heads, rows, dim] = x.shape();
        if (batch, heads, dim) != (1, 1, self.dim) {
            return Err(Error::value("x", format!("shape {:?}", x.shape()), format!("rows of {}", self.dim)));
        }
        let isa = simd::current();
        let parts = map(execution, rows.div_ceil(CHUNK), |i| {
            self.encode_rows(isa, x, 0, i * CHUNK..((i + 1) * CHUNK).min(rows))
        })?;
        let mut entries = Vec::with_capacity(rows * self.top_k);
        for part in parts {
            entries.extend_from_slice(&part.map_err(|(row, _)| {
                Error::value("x", format!("NaN or infinity in features of row {row}"), "finite numbers up to 65504")
            })?);
        }
        Ok(entries)
    }

    fn encode_rows(&self, isa: Isa, x: &TensorView, head: usize, range: Range<usize>) -> Encoded {
        with_element!(x.dtype(), T => {
            let rows = Strided { base: x.head::<T>(0, head), stride: x.row_stride() };
            dispatch(isa, EncodeRows { encoder: self, head, rows, range }).map_err(|row| (row, head))
        })
    }
}

/// Entries of rows, or the row and head whose features are not finite.
type Encoded = std::result::Result<Vec<(u32, f32)>, (usize, usize)>;

/// Features of some rows, which exist.
struct EncodeRows<'a, T> {
    encoder: &'a Encoder,
    head: usize,
    rows: Strided<T>,
    range: Range<usize>,
}

impl<T: Element> Kernel for EncodeRows<'_, T> {
    type Output = std::result::Result<Vec<(u32, f32)>, usize>;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Self::Output {
        let Self { encoder, head, rows, range } = self;
        let (features, dim) = (encoder.features, encoder.dim);
        let weights = encoder.of_head(&encoder.weights, head);
        let (bias, centre) = (encoder.of_head(&encoder.bias, head), encoder.of_head(&encoder.centre, head));
        let mut entries = Vec::with_capacity(range.len() * encoder.top_k);
        let mut order = Vec::new();
        if range.len() >= MANY {
            let mut matrix = PackedMatrix::new(s, weights, features, dim);
            let (mut z, mut wide) = (vec![0f32; matrix.result_len::<S>()], Buffer::default());
            for first in range.clone().step_by(ROWS) {
                let count = ROWS.min(range.end - first);
                // SAFETY: the caller's rows exist and have `dim` elements.
                unsafe { matrix.apply(s, rows, first, count, Some(centre), &mut wide, &mut z) };
                for r in 0..count {
                    let z = &mut z[r * matrix.stride::<S>()..][..features];
                    if !choose(encoder, z, bias, &mut order, &mut entries) {
                        return Err(first + r);
                    }
                }
            }
        } else {
            let padded = dim.next_multiple_of(S::LANES);
            let (mut z, mut x) = (vec![0f32; features], vec![0f32; padded]);
            for row in range {
                // SAFETY: the row exists and has `dim` elements; `x` has the padded length.
                unsafe { widen_row(s, rows.row(row), dim, x.as_mut_ptr(), padded) };
                x.iter_mut().zip(centre).for_each(|(x, c)| *x -= c);
                for (f, z) in z.iter_mut().enumerate() {
                    *z = dot(s, &weights[f * dim..(f + 1) * dim], &x[..dim]);
                }
                if !choose(encoder, &mut z, bias, &mut order, &mut entries) {
                    return Err(row);
                }
            }
        }
        Ok(entries)
    }
}

/// Dot product of two slices of one length.
#[inline(always)]
fn dot<S: Simd>(s: S, a: &[f32], b: &[f32]) -> f32 {
    let whole = a.len() / S::LANES * S::LANES;
    let mut sums = s.zero();
    for i in (0..whole).step_by(S::LANES) {
        // SAFETY: i + LANES <= whole, which both slices have.
        sums = unsafe { s.fma(s.load(a.as_ptr().add(i)), s.load(b.as_ptr().add(i)), sums) };
    }
    let mut rest = 0.0;
    for (x, y) in a[whole..].iter().zip(&b[whole..]) {
        rest += x * y;
    }
    s.sum(sums) + rest
}

/// Appends the largest `top_k` of `z + bias`, the lower feature of equals, ascending by feature; false where one is beyond f16.
#[inline(always)]
fn choose(encoder: &Encoder, z: &mut [f32], bias: &[f32], order: &mut Vec<u32>, entries: &mut Vec<(u32, f32)>) -> bool {
    let mut fits = true;
    for (z, b) in z.iter_mut().zip(bias) {
        *z += b;
        fits &= z.abs() <= f16::MAX.to_f32();
    }
    if !fits {
        return false;
    }
    order.clear();
    order.extend((0..z.len() as u32).filter(|&f| !encoder.relu || z[f as usize] > 0.0));
    if order.len() > encoder.top_k {
        let larger = |&a: &u32, &b: &u32| z[b as usize].total_cmp(&z[a as usize]).then(a.cmp(&b));
        order.select_nth_unstable_by(encoder.top_k, larger);
        order.truncate(encoder.top_k);
    }
    order.sort_unstable();
    entries.extend(order.iter().map(|&f| (f, z[f as usize])));
    entries.extend(std::iter::repeat_n((0, 0.0), encoder.top_k - order.len()));
    true
}

/// How [`Features`] ranks rows.
#[derive(Clone, Copy, Debug)]
pub struct FeatureOptions {
    /// Weigh features by how few rows have them.
    pub idf: bool,
    /// Features that more than this share of the rows have do not count; 1 lets all count.
    pub stop_share: f32,
    /// Queries come times this; they are divided by it before they are encoded.
    pub softmax_scale: f32,
}

#[derive(Clone)]
struct State {
    heads: Vec<Postings>,
}

impl State {
    fn rows(&self) -> usize {
        self.heads[0].rows()
    }
}

impl Grow for State {
    fn wants(&self, len: usize) -> bool {
        self.rows() < len
    }

    fn cut(&mut self, len: usize) {
        self.heads.iter_mut().for_each(|postings| postings.truncate(len));
    }
}

/// An index of sparse features over every key of a store; it ranks and estimates nothing.
pub struct Features {
    encoder: Arc<Encoder>,
    options: FeatureOptions,
    postings: Followed<State>,
}

impl Features {
    /// An index over a store, empty until it is first read.
    pub fn new(store: Arc<KvStore>, encoder: Encoder, options: FeatureOptions) -> Result<Self> {
        check_numbers(&store)?;
        let heads = store.kv_heads();
        if encoder.dim != store.head_dim() || ![1, heads].contains(&encoder.heads()) {
            let got = format!("weights of {} heads of width {}", encoder.heads(), encoder.dim);
            let expected = format!("{heads} heads, or one for all, of width {}", store.head_dim());
            return Err(Error::value("w_enc", got, expected));
        }
        if !(options.stop_share > 0.0 && options.stop_share <= 1.0) {
            return Err(Error::value("stop_share", options.stop_share, "above 0, at most 1"));
        }
        if !(options.softmax_scale.is_finite() && options.softmax_scale != 0.0) {
            return Err(Error::value("scale", options.softmax_scale, "a finite number other than 0"));
        }
        let state = State { heads: vec![Postings::new(encoder.features); heads] };
        Ok(Self { encoder: Arc::new(encoder), options, postings: Followed::new(store, state) })
    }

    fn follow(&self, state: &mut State, reader: &Reader, execution: &Execution) -> Result<()> {
        let keys = numbers(reader.keys());
        let (isa, first, target) = (simd::current(), state.rows(), reader.len());
        let (heads, chunks) = (state.heads.len(), (target - first).div_ceil(CHUNK));
        let parts = map(execution, heads * chunks, |i| {
            let start = first + i % chunks * CHUNK;
            self.encoder.encode_rows(isa, &keys, i / chunks, start..(start + CHUNK).min(target))
        })?;
        // All or nothing.
        let parts: Vec<_> =
            parts.into_iter().collect::<std::result::Result<_, _>>().map_err(|(row, head)| not_finite(row, head))?;
        for (i, entries) in parts.iter().enumerate() {
            state.heads[i / chunks].add(entries, self.encoder.top_k);
        }
        Ok(())
    }

    pub(crate) fn load(store: Arc<KvStore>, mut saved: Saved) -> Result<Self> {
        let (heads, dim) = (store.kv_heads(), store.head_dim());
        let (own, features) = (saved.integer("encoders")? as usize, saved.integer("features")? as usize);
        let encoder = Encoder {
            weights: saved.take("weights", &[own, features, dim])?,
            bias: saved.take("bias", &[own, features])?,
            centre: saved.take("centre", &[own, dim])?,
            features,
            dim,
            top_k: saved.integer("top_k")? as usize,
            relu: saved.flag("relu")?,
        };
        let options = FeatureOptions {
            idf: saved.flag("idf")?,
            stop_share: saved.number("stop_share")? as f32,
            softmax_scale: saved.number("scale")? as f32,
        };
        let mut index = Self::new(Arc::clone(&store), encoder, options)?;
        let mut state = State { heads: Vec::new() };
        for h in 0..heads {
            let counts: Vec<u32> = saved.take(&format!("counts.{h}"), &[features])?;
            let rows: Vec<u32> = saved.take_list(&format!("rows.{h}"))?;
            let activations: Vec<u16> = saved.take_list(&format!("activations.{h}"))?;
            let postings = Postings::from_flat(&counts, &rows, &activations, saved.rows);
            let lacks = || Error::value("path", "lists that do not fit each other", "lists as saved");
            state.heads.push(postings.ok_or_else(lacks)?);
        }
        index.postings = Followed::new(store, state);
        Ok(index)
    }
}

impl Index for Features {
    fn store(&self) -> &Arc<KvStore> {
        self.postings.store()
    }

    fn kind(&self) -> &'static str {
        "features"
    }

    fn estimates(&self) -> bool {
        false
    }

    fn len(&self) -> usize {
        self.postings.look().rows()
    }

    fn nbytes(&self) -> usize {
        self.postings.look().heads.iter().map(Postings::nbytes).sum::<usize>() + self.encoder.nbytes()
    }

    fn pending_operations(&self) -> f64 {
        let store = self.store();
        let rows = store.len().saturating_sub(self.len()) * store.kv_heads();
        (rows * self.encoder.dim) as f64 * self.encoder.features as f64
    }

    fn read<'a>(&'a self, reader: &'a Reader<'a>, execution: &Execution) -> Result<Box<dyn View + 'a>> {
        let state =
            self.postings.read(reader, execution, |state, reader, execution| self.follow(state, reader, execution))?;
        Ok(Box::new(Moment { index: self, state }))
    }

    fn fork(&self, store: Arc<KvStore>) -> Result<Arc<dyn Index>> {
        let postings = self.postings.fork(store)?;
        Ok(Arc::new(Self { encoder: Arc::clone(&self.encoder), options: self.options, postings }))
    }

    fn parameters(&self) -> Parameters {
        let (encoder, options) = (&self.encoder, &self.options);
        let mut parameters = Parameters::new();
        parameters.insert("features".into(), encoder.features.into());
        parameters.insert("encoders".into(), encoder.heads().into());
        parameters.insert("top_k".into(), encoder.top_k.into());
        parameters.insert("relu".into(), encoder.relu.into());
        parameters.insert("idf".into(), options.idf.into());
        parameters.insert("stop_share".into(), f64::from(options.stop_share).into());
        parameters.insert("scale".into(), f64::from(options.softmax_scale).into());
        parameters
    }

    fn save(&self) -> Saved {
        let (state, encoder) = (self.postings.look(), &self.encoder);
        let (own, features, dim) = (encoder.heads(), encoder.features, encoder.dim);
        let mut saved = Saved::new(state.rows(), self.parameters())
            .tensor("weights", &[own, features, dim], encoder.weights.clone())
            .tensor("bias", &[own, features], encoder.bias.clone())
            .tensor("centre", &[own, dim], encoder.centre.clone());
        for (h, postings) in state.heads.iter().enumerate() {
            let (counts, rows, activations) = postings.flat();
            saved = saved
                .tensor(format!("counts.{h}"), &[features], counts)
                .tensor(format!("rows.{h}"), &[rows.len()], rows)
                .tensor(format!("activations.{h}"), &[activations.len()], activations);
        }
        saved
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// The lists of a store at one moment.
struct Moment<'a> {
    index: &'a Features,
    state: Grown<'a, State>,
}

impl View for Moment<'_> {
    fn covered(&self) -> usize {
        self.state.rows()
    }

    fn pick(&self, ask: &Ask) -> Pick {
        let (index, postings) = (self.index, &self.state.heads[ask.head]);
        let (encoder, options) = (&index.encoder, index.options);
        let mut sums = vec![0f32; encoder.features];
        for query in ask.queries {
            let query: Vec<f32> = query.iter().map(|x| x / options.softmax_scale).collect();
            let rows = Strided { base: query.as_ptr(), stride: encoder.dim as isize };
            // A query whose features are not finite finds nothing.
            let found = dispatch(ask.isa, EncodeRows { encoder, head: ask.head, rows, range: 0..1 });
            for (feature, activation) in found.unwrap_or_default() {
                sums[feature as usize] += activation;
            }
        }
        let sums: Vec<_> = sums.into_iter().enumerate().map(|(f, sum)| (f as u32, sum)).collect();
        let weighted = postings.weighted(&sums, options.idf, options.stop_share);
        let candidates = ask.candidates.clone();
        let mut scores = vec![0f32; candidates.len()];
        let read = postings.score(&weighted, candidates.clone(), &mut scores);
        let wanted = match ask.select {
            Select::TopK(rows) => rows.min(scores.len()),
            // Refused before, for an index that estimates nothing.
            Select::TopP(_) => scores.len(),
        };
        let mut order: Vec<u32> = (0..scores.len() as u32).collect();
        if wanted < order.len() {
            let larger = |&a: &u32, &b: &u32| scores[b as usize].total_cmp(&scores[a as usize]).then(a.cmp(&b));
            order.select_nth_unstable_by(wanted, larger);
            order.truncate(wanted);
            order.sort_unstable();
        }
        let rows = order.into_iter().map(|j| candidates.start as u32 + j).collect();
        Pick { rows, scored: scores.len(), bytes: 6 * read, ..Pick::default() }
    }
}
