//! Recurrences of matrix states, `S_t = A_t S_(t-1) + k_t u_t^T`, `o_t = scale q_t^T S_t`, computed chunk by chunk.
//!
//! ```text
//! A_t      identity, a decay e^g of the whole state, or one of each of its rows (channels of the keys) or of its columns
//! u_t      beta_t v_t, or by the delta rule beta_t (v_t - k_t^T A_t S_(t-1)); besides k_t u_t^T perhaps b_t (a_t^T S_(t-1))
//! chunk    P = (Q K^T) * decays, lower triangle                               scores.rs
//!          X = V, or (I + A)^-1 diag(beta) (V - K' S), A like P but of the keys with themselves, strictly lower
//!          O = Q' S + P X,   S = decay S + K''^T X                            chunk.rs; Q', K', K'': rows times decays
//! one row  straight from the formula, in one pass over the state             step.rs
//! gradients, in reverse, from the states at the chunks' starts                 backward.rs and on
//! ```
//! States of different value columns know nothing of each other: work is cut into sequences, heads and, where these are fewer than
//! threads, columns. What is computed for a column does not depend on the cut. All arithmetic is f32; sums of log decays along a
//! chunk are f64. No exponential of a positive number is ever formed: decays between rows are products of numbers of at most 1.

mod backward;
mod block;
mod chunk;
mod columns;
mod coming;
mod decays;
pub mod double;
mod gradient;
mod prepare;
mod products;
mod rows;
mod scores;
mod step;
mod work;

pub(super) use rows::{load, load_numbers, multiply_rows, scale_row};
pub(super) use scores::{add_up, dot, product, turn};

use super::features::{FeatureMap, Map};
use crate::dense::scratch::with_scratch;
use crate::parallel::{Execution, for_each, num_threads};
use crate::simd::tiles::Tiles;
use crate::simd::{self, Isa, dispatch};
use crate::tensor::{DType, Error, Result, TensorView, TensorViewMut, with_element};
use std::ops::{Deref, Range};

pub use backward::{Gradients, Outputs, recurrence_backward};

/// Most rows of a chunk: fewer than the rows of a packed panel of values, and a multiple of every instruction set's `ROWS`.
pub const MAX_CHUNK: usize = 252;

/// Value columns that an item has at least, a multiple of every panel.
const COLUMNS: usize = 32;

/// Bytes of states below which decode steps are not worth waking other threads.
const SMALL: usize = 1 << 20;

/// What happens to a state between two updates. Logarithms are natural and at most 0; `-inf` forgets everything.
#[derive(Clone, Copy)]
pub enum Decay<V> {
    /// Nothing.
    None,
    /// All of it is multiplied by `e^g`; `g` is `[batch, heads, length, 1]`.
    Token(V),
    /// Its rows are multiplied by `e^g` each; `g` is `[batch, heads, length, dim]`.
    Channel(V),
    /// Its columns are multiplied by `e^g` each; `g` is `[batch, heads, length, value_dim]`. Only the plain recurrence has it.
    Value {
        /// Logarithms.
        g: V,
        /// Multiply values by `1 - e^g`.
        fills: bool,
    },
}

impl<V: Copy> Decay<V> {
    /// Logarithms of decays per column.
    fn of_values(&self) -> Option<V> {
        if let Decay::Value { g, .. } = self { Some(*g) } else { None }
    }
}

/// Where states begin.
#[derive(Clone, Copy)]
pub enum Start<'a> {
    /// At zero.
    Zero,
    /// At these, f32 in the shape of the final states.
    From(TensorView<'a>),
    /// At what the array of the final states holds.
    InPlace,
}

/// An array of rank 4, whatever its numbers are.
pub trait Shaped: Copy {
    /// Its shape.
    fn shape(&self) -> [usize; 4];
}

impl Shaped for TensorView<'_> {
    fn shape(&self) -> [usize; 4] {
        self.shape()
    }
}

/// The arguments of [`recurrence`], views and numbers of any type. States belong to the heads of `v`; heads of `k` divide these, and heads of `q` divide them or are
/// a multiple.
#[derive(Clone, Copy)]
pub struct Recurrence<'a, V = TensorView<'a>, F = f32> {
    /// `[batch, query heads, length, dim]`.
    pub q: V,
    /// `[batch, key heads, length, dim]`; none: `1 - e^g` of a decay per channel.
    pub k: Option<V>,
    /// `[batch, heads, length, value_dim]`.
    pub v: V,
    /// `A_t`.
    pub decay: Decay<V>,
    /// Factor of updates, `[batch, heads, length, 1]`; none is 1.
    pub beta: Option<V>,
    /// Whether an update is what the state does not hold yet.
    pub delta: bool,
    /// Factor of outputs.
    pub scale: F,
    /// Divide rows of `q` and `k` by `sqrt(sum of squares + this)`.
    pub unit: Option<F>,
    /// Divide outputs by `scale q_t^T z_t + this`, `z_t` the state of a value of 1, which is the last column of states. An output whose
    /// divisor is 0 is 0. Not with `delta`.
    pub normaliser: Option<F>,
    /// `skip[h] v_t` is added to the outputs of head h. Not with `delta` or `normaliser`.
    pub skip: Option<&'a [F]>,
    /// `o_t = scale q_t^T (S_(t-1) + Diag(bonus) k_t v_t^T)`, numbers `[heads, dim]`. With decays per channel, and nothing else.
    pub bonus: Option<&'a [F]>,
    /// `S_t = A_t S_(t-1) + b_t (a_t^T S_(t-1)) + k_t v_t^T`: `a` and `b`, in the shape of `k`. With decays per channel, and nothing
    /// else.
    pub pair: Option<[V; 2]>,
    /// Scores of rows of a chunk with each other are `max(s, 0)^2`, which makes chunks a part of what is computed. The plain recurrence
    /// without decays alone has it. A row that is not finite spoils its chunk.
    pub squares: bool,
    /// What makes features of rows of `q` and of `k`, whose dims are then theirs. Not with `unit`.
    pub maps: [Option<&'a FeatureMap<'a>>; 2],
    /// States before the first row.
    pub start: Start<'a>,
    /// Sequences packed along the length of a batch of 1: the bounds of each, beginning with 0.
    pub ends: Option<&'a [usize]>,
    /// Rows computed at once, at most [`MAX_CHUNK`].
    pub chunk: usize,
}

/// Checked inputs.
struct Inputs<'a, V = TensorView<'a>, F = f32> {
    of: Recurrence<'a, V, F>,
    sequences: usize,
    heads: usize,
    query_heads: usize,
    key_heads: usize,
    dim: usize,
    value_dim: usize,
}

/// A checked call.
struct Job<'a> {
    inputs: Inputs<'a>,
    out: &'a TensorViewMut<'a>,
    state: &'a TensorViewMut<'a>,
    /// States that are read first, where they do not begin at zero.
    first: Option<TensorView<'a>>,
    /// Sums of keys that they come with, `[sequences, heads, dim]`; empty without normaliser.
    sums: Vec<f32>,
    /// Matrix registers, where the instruction set has them.
    tiles: Option<Tiles>,
}

impl<'a> Deref for Job<'a> {
    type Target = Inputs<'a>;

    fn deref(&self) -> &Inputs<'a> {
        &self.inputs
    }
}

impl<V: Shaped, F> Inputs<'_, V, F> {
    /// Entry of the batch and rows of a sequence.
    fn sequence(&self, n: usize) -> (usize, Range<usize>) {
        match self.of.ends {
            Some(ends) => (0, ends[n]..ends[n + 1]),
            None => (n, 0..self.of.v.shape()[2]),
        }
    }

    /// Query heads that read the state of a head, and how many there are.
    fn readers(&self, head: usize) -> Range<usize> {
        if self.query_heads >= self.heads {
            let group = self.query_heads / self.heads;
            head * group..(head + 1) * group
        } else {
            let first = head / (self.heads / self.query_heads);
            first..first + 1
        }
    }

    /// The head of outputs for query head number `g` of those that read a state.
    fn out_head(&self, head: usize, g: usize) -> usize {
        if self.query_heads >= self.heads { head * (self.query_heads / self.heads) + g } else { head }
    }

    fn key_head(&self, head: usize) -> usize {
        head / (self.heads / self.key_heads)
    }
}

fn expect(name: &'static str, got: [usize; 4], expected: [usize; 4]) -> Result<()> {
    if got == expected { Ok(()) } else { Err(Error::value(name, format!("shape {got:?}"), format!("{expected:?}"))) }
}

fn check_inputs<'a, V: Shaped, F>(of: Recurrence<'a, V, F>) -> Result<Inputs<'a, V, F>> {
    let [batch, heads, length, value_dim] = of.v.shape();
    let [_, query_heads, _, q_dim] = of.q.shape();
    for (map, x, name) in [(of.maps[0], Some(of.q), "q"), (of.maps[1], of.k, "k")] {
        let Some(map) = map else { continue };
        let Some(x) = x else { return Err(Error::value("k", "none", "keys to make features of")) };
        map.check(name, x.shape())?;
        if of.unit.is_some() || map.map == Map::PositionSoftmax || map.rotation.is_some() {
            return Err(Error::value(
                "map",
                format!("{:?}", map.map),
                "one of rows by themselves, which it may normalise",
            ));
        }
    }
    let features = |map: Option<&FeatureMap>, dim| map.map_or(dim, |map| map.features(dim));
    let dim = features(of.maps[0], q_dim);
    let key_heads = of.k.map_or(heads, |k| k.shape()[1]);
    expect("q", of.q.shape(), [batch, query_heads, length, q_dim])?;
    if heads == 0 || key_heads == 0 || query_heads == 0 || heads % key_heads != 0 {
        let expected = format!("a divisor of the {heads} heads of v");
        return Err(Error::value("k", format!("{key_heads} heads"), expected));
    }
    if query_heads % heads != 0 && heads % query_heads != 0 || query_heads % key_heads != 0 {
        let expected =
            format!("a multiple of the {key_heads} of k that divides the {heads} of v, or a multiple of these");
        return Err(Error::value("q", format!("{query_heads} heads"), expected));
    }
    if dim == 0 || value_dim == 0 {
        return Err(Error::value("v", format!("head_dim {dim} and {value_dim}"), "at least 1"));
    }
    if let Some(k) = of.k {
        let k_dim = k.shape()[3];
        expect("k", k.shape(), [batch, key_heads, length, k_dim])?;
        if features(of.maps[1], k_dim) != dim {
            return Err(Error::value("k", format!("{} features", features(of.maps[1], k_dim)), format!("{dim} as q")));
        }
    } else if !matches!(of.decay, Decay::Channel(_)) {
        return Err(Error::value("k", "none", "keys, or a decay per channel to make them of"));
    }
    match of.decay {
        Decay::None => {}
        Decay::Token(g) => expect("g", g.shape(), [batch, heads, length, 1])?,
        Decay::Channel(g) => expect("g", g.shape(), [batch, heads, length, dim])?,
        Decay::Value { g, .. } => expect("g", g.shape(), [batch, heads, length, value_dim])?,
    }
    for (x, name) in of.pair.iter().flatten().zip(["a", "b"]) {
        expect(name, x.shape(), [batch, key_heads, length, dim])?;
    }
    if let Some(bonus) = of.bonus
        && bonus.len() != heads * dim
    {
        return Err(Error::value("bonus", format!("{} numbers", bonus.len()), heads * dim));
    }
    let plain = !of.delta && of.normaliser.is_none() && of.skip.is_none();
    let by_channel = matches!(of.decay, Decay::Channel(_));
    let by_column = matches!(of.decay, Decay::Value { .. });
    let squares = of.squares && !matches!(of.decay, Decay::None);
    let alone = [of.bonus.is_some(), of.pair.is_some(), by_column, of.squares, squares].map(usize::from);
    if alone.iter().sum::<usize>() > usize::from(plain) || (of.bonus.is_some() || of.pair.is_some()) && !by_channel {
        return Err(Error::value("decay", "a combination that is not defined", "one rule of update and read-out"));
    }
    if let Some(beta) = of.beta {
        expect("beta", beta.shape(), [batch, heads, length, 1])?;
    }
    if of.chunk == 0 || of.chunk > MAX_CHUNK {
        return Err(Error::value("chunk_size", of.chunk, format!("1 to {MAX_CHUNK}")));
    }
    if of.delta && (of.normaliser.is_some() || of.skip.is_some()) || of.normaliser.is_some() && of.skip.is_some() {
        return Err(Error::value(
            "normalize",
            "with another read-out",
            "one of a normaliser, a skip and the delta rule",
        ));
    }
    if let Some(skip) = of.skip
        && skip.len() != heads
    {
        return Err(Error::value("skip", format!("{} numbers", skip.len()), format!("{heads}, one per head")));
    }
    let sequences = match of.ends {
        None => batch,
        Some(ends) => {
            let ordered = ends.first() == Some(&0) && ends.last() == Some(&length) && ends.is_sorted();
            if !ordered || batch != 1 {
                let got = format!("{ends:?} with a batch of {batch}");
                return Err(Error::value(
                    "cu_seqlens",
                    got,
                    format!("bounds from 0 to {length} that never fall, batch 1"),
                ));
            }
            ends.len() - 1
        }
    };
    Ok(Inputs { of, sequences, heads, query_heads, key_heads, dim, value_dim })
}

fn check<'a>(isa: Isa, of: Recurrence<'a>, out: &'a TensorViewMut, state: &'a TensorViewMut) -> Result<Job<'a>> {
    let inputs = check_inputs(of)?;
    let Inputs { sequences, heads, query_heads, dim, value_dim, .. } = inputs;
    let [batch, _, length, _] = of.v.shape();
    expect("out", out.shape(), [batch, query_heads.max(heads), length, value_dim])?;
    let states = [sequences, heads, dim, value_dim + usize::from(of.normaliser.is_some())];
    expect("out_state", state.shape(), states)?;
    let first = match of.start {
        Start::Zero => None,
        Start::From(first) => Some(first),
        Start::InPlace => Some(state.as_view()),
    };
    if let Some(first) = first {
        expect("initial_state", first.shape(), states)?;
    }
    for (name, dtype) in [("out_state", state.dtype()), ("initial_state", first.map_or(DType::F32, |x| x.dtype()))] {
        if dtype != DType::F32 {
            return Err(Error::dtype(name, dtype, "float32"));
        }
    }
    let mut sums = vec![];
    if of.normaliser.is_some() {
        sums.resize(sequences * heads * dim, 0.0);
        if let Some(first) = first {
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum = first.row::<f32>(i / dim / heads, i / dim % heads, i % dim)[value_dim];
            }
        }
    }
    Ok(Job { inputs, out, state, first, sums, tiles: isa.tiles() })
}

/// An error where a number of a gate is above 0 or NaN, or not finite where it is `signed`.
fn check_gate(isa: Isa, name: &'static str, gate: TensorView, signed: bool, execution: &Execution) -> Result<()> {
    let [batch, heads, length, _] = gate.shape();
    let pieces = length.div_ceil(GATE_ROWS);
    let bad = std::sync::atomic::AtomicBool::new(false);
    let work = |i: usize| {
        let (head, rows) = (i / pieces, i % pieces * GATE_ROWS..length.min((i % pieces + 1) * GATE_ROWS));
        with_element!(gate.dtype(), T => {
            let part = rows::Gate::<T> { gate, batch: head / heads, head: head % heads, rows, signed, element: std::marker::PhantomData };
            if !dispatch(isa, part) {
                bad.store(true, std::sync::atomic::Ordering::Relaxed);
            }
        });
    };
    if gate.shape().iter().product::<usize>() < 1 << 16 {
        (0..batch * heads * pieces).for_each(work);
    } else {
        for_each(execution, batch * heads * pieces, work)?;
    }
    if bad.into_inner() {
        let (got, expected) = if signed {
            ("a number that is not finite", "finite ones")
        } else {
            ("a number above 0 or NaN", "logarithms of decays, at most 0")
        };
        return Err(Error::value(name, got, expected));
    }
    Ok(())
}

/// An error where a decay or a factor of updates is outside its range.
fn check_gates(isa: Isa, of: &Recurrence, execution: &Execution) -> Result<()> {
    if let Decay::Token(g) | Decay::Channel(g) | Decay::Value { g, .. } = of.decay {
        check_gate(isa, "g", g, false, execution)?;
    }
    if let Some(beta) = of.beta {
        check_gate(isa, "beta", beta, true, execution)?;
    }
    Ok(())
}

/// Rows of a gate that are checked as one item.
const GATE_ROWS: usize = 4096;

/// Runs a recurrence over every sequence and head.
///
/// `out` is `[batch, max(query heads, heads), length, value_dim]`; `state`, f32 `[sequences, heads, dim, value_dim]` (one column more
/// with a normaliser), gets the states after the last rows. A sequence without rows keeps its first state. Rows that hold NaN or an
/// infinity spoil what comes after them and nothing before.
pub fn recurrence(
    of: Recurrence,
    out: &mut TensorViewMut,
    state: &mut TensorViewMut,
    execution: &Execution,
) -> Result<()> {
    run(simd::current(), of, out, state, execution)
}

/// [`recurrence`] on an instruction set.
fn run(
    isa: Isa,
    of: Recurrence,
    out: &mut TensorViewMut,
    state: &mut TensorViewMut,
    execution: &Execution,
) -> Result<()> {
    let job = check(isa, of, out, state)?;
    check_gates(isa, &of, execution)?;
    let [sequences, heads, dim, value_dim] = job.state.shape();
    let pairs = sequences * heads;
    let is_step = !of.squares && (0..sequences).all(|n| job.sequence(n).1.len() <= 1);
    let step = |i: usize| {
        with_scratch(|scratch| dispatch(isa, step::Step { job: &job, sequence: i / heads, head: i % heads, scratch }))
    };
    if is_step {
        if pairs * dim * value_dim * 4 < SMALL {
            (0..pairs).for_each(step);
            return Ok(());
        }
        return for_each(execution, pairs, step);
    }
    // Columns of an item: all of them, unless threads would be left without work.
    let most = job.value_dim.div_ceil(COLUMNS);
    let cuts = num_threads().div_ceil(pairs.max(1)).min(most);
    let width = most.div_ceil(cuts) * COLUMNS;
    let mut order: Vec<usize> = (0..sequences).collect();
    order.sort_by_key(|&n| std::cmp::Reverse(job.sequence(n).1.len()));
    for_each(execution, pairs * cuts, |i| {
        let (sequence, head) = (order[i / cuts / heads], i / cuts % heads);
        let columns = (i % cuts * width).min(job.value_dim)..((i % cuts + 1) * width).min(job.value_dim);
        if !of.squares && job.sequence(sequence).1.len() <= 1 {
            if i % cuts == 0 {
                step(sequence * heads + head);
            }
        } else if !columns.is_empty() {
            let cancel = &execution.cancel;
            with_scratch(|scratch| dispatch(isa, chunk::Item { job: &job, sequence, head, columns, cancel, scratch }));
        }
    })
}

#[cfg(test)]
mod tests;
