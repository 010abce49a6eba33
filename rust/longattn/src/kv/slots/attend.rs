//! Attention over the rows of a slot store.

use super::{Mean, SlotStore};
use crate::dense::listed::{self, MeanRow, Told, Unit};
use crate::dense::{Broadcast, Options, Problem, Reduce};
use crate::parallel::Execution;
use crate::simd;
use crate::tensor::{DType, Error, Result, TensorView, TensorViewMut};

/// What [`SlotStore::attend`] is asked for beside the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Observe {
    /// Nothing.
    Nothing,
    /// Of every slot the softmax weight `e^(logit - lse)`, over the query heads of its KV head's group.
    Weights(Reduce),
    /// Of every slot of one query head's KV head, the logit of that query head before a bias.
    Logits(usize),
}

/// The means as attention reads them.
struct Folded {
    key: Vec<f32>,
    value: Vec<f32>,
    count: u64,
}

impl Mean {
    fn folded(&self) -> Folded {
        let narrow = |x: &[f64]| x.iter().map(|&x| x as f32).collect();
        Folded { key: narrow(&self.key), value: narrow(&self.value), count: self.count }
    }
}

impl SlotStore {
    /// Attention of `q`, `[1, query heads, queries, head_dim]`, the last `queries` rows appended, over the kept rows up to each one's
    /// position, and over the mean of the folded ones.
    ///
    /// With `within`, `[kv_heads, slots]`, only rows are read where it is non-zero; `bias`, `[kv_heads, slots]`, is added to the logits
    /// of the slots. Of `options`, `scale`, `softcap` and `sinks` count. `out` is `[1, query heads, queries, value_dim]`, `lse` `[1,
    /// query heads, queries, 1]` in f32. What `observe` asks for goes to `observed`: weights `[kv_heads, queries, slots]`, logits
    /// `[queries, slots]`, 0 where nothing was read.
    pub fn attend(
        &self,
        q: TensorView,
        options: Options,
        within: Option<&[u8]>,
        bias: Option<&[f32]>,
        observe: Observe,
        observed: &mut [f32],
        out: &mut TensorViewMut,
        lse: &mut TensorViewMut,
        execution: &Execution,
    ) -> Result<()> {
        let [batch, heads, queries, dim] = q.shape();
        if batch != 1 || dim != self.head_dim || heads == 0 || heads % self.kv_heads != 0 {
            let expected = format!("[1, a multiple of {}, queries, {}]", self.kv_heads, self.head_dim);
            return Err(Error::value("q", format!("shape {:?}", q.shape()), expected));
        }
        let group = heads / self.kv_heads;
        if out.shape() != [1, heads, queries, self.value_dim] {
            let expected = format!("[1, {heads}, {queries}, {}]", self.value_dim);
            return Err(Error::value("out", format!("shape {:?}", out.shape()), expected));
        }
        if lse.shape() != [1, heads, queries, 1] || lse.dtype() != DType::F32 {
            let expected = format!("float32 [1, {heads}, {queries}, 1]");
            return Err(Error::value("lse", format!("{} {:?}", lse.dtype(), lse.shape()), expected));
        }
        if let Some(sinks) = options.sinks.filter(|sinks| sinks.len() != heads) {
            return Err(Error::value("sinks", format!("{} numbers", sinks.len()), heads));
        }
        for (name, got) in [("within", within.map(<[u8]>::len)), ("bias", bias.map(<[f32]>::len))] {
            got.map_or(Ok(()), |got| self.check_slots(name, got))?;
        }
        let wanted = match observe {
            Observe::Nothing => 0,
            Observe::Weights(_) => self.kv_heads * queries * self.slots,
            Observe::Logits(head) if head >= heads => {
                return Err(Error::value("head", head, format!("a head below {heads}")));
            }
            Observe::Logits(_) => queries * self.slots,
        };
        if observed.len() != wanted {
            return Err(Error::value("observed", format!("{} numbers", observed.len()), wanted));
        }
        let state = self.read();
        if queries > state.appended {
            let got = format!("{queries} queries on {} rows", state.appended);
            return Err(Error::value("q", got, "queries that are the last rows appended"));
        }

        // What each head reads for each query: all rows, or those that a query before the last knows of.
        let lists: Vec<Vec<u32>> = (0..self.kv_heads * queries)
            .map(|i| {
                let (h, last) = (i / queries, (state.appended - queries + i % queries) as i64);
                let head = &state.heads[h];
                let seen = |slot: &&u32| {
                    let slot = **slot as usize;
                    head.positions[slot] <= last && within.is_none_or(|within| within[h * self.slots + slot] != 0)
                };
                head.live.iter().filter(seen).copied().collect()
            })
            .collect();
        let biases: Vec<Vec<f32>> = match bias {
            None => Vec::new(),
            Some(bias) => lists
                .iter()
                .enumerate()
                .map(|(i, list)| {
                    let h = i / queries;
                    let mut of_list = vec![0.0; state.heads[h].positions.len()];
                    for (to, &slot) in of_list.iter_mut().zip(list) {
                        *to = bias[h * self.slots + slot as usize];
                    }
                    of_list
                })
                .collect(),
        };
        let means: Vec<Folded> = state.heads.iter().map(|head| head.mean.folded()).collect();
        let of_group = |h: usize| h * group..(h + 1) * group;
        let targets: Vec<_> = (0..self.kv_heads).map(|h| (out.heads(of_group(h)), lse.heads(of_group(h)))).collect();
        let mut units = Vec::with_capacity(lists.len());
        for (i, list) in lists.iter().enumerate() {
            let (h, row) = (i / queries, i % queries);
            let [k, v] = state.heads[h].views();
            let bias = match biases.get(i) {
                Some(bias) => Some(Broadcast::new(bias, [1, 1, 1, bias.len()])?),
                None => None,
            };
            let sinks = options.sinks.map(|sinks| &sinks[of_group(h)]);
            let dense = Options { scale: options.scale, softcap: options.softcap, sinks, bias, ..Options::default() };
            let mean = &means[h];
            let mean =
                (mean.count > 0).then_some(MeanRow { key: &mean.key, value: &mean.value, count: mean.count as f64 });
            let told = match observe {
                Observe::Weights(reduce) => Told::Weights(reduce),
                Observe::Logits(head) if head / group == h => Told::Logits(head % group),
                _ => Told::Nothing,
            };
            let problem = Problem::new(q.heads(of_group(h)), k.into(), v.into(), dense)?;
            let (out, lse) = (&targets[h].0, &targets[h].1);
            units.push(Unit { problem, batch: 0, kv_head: 0, row, list, mean, told, out, lse });
        }
        let told = listed::attend(simd::current(), &units, execution)?;
        observed.fill(0.0);
        for (i, (unit, told)) in units.iter().zip(told).enumerate() {
            let at = match unit.told {
                Told::Nothing => continue,
                Told::Weights(_) => i,
                Told::Logits(_) => i % queries,
            };
            let to = &mut observed[at * self.slots..(at + 1) * self.slots];
            unit.list.iter().zip(told).for_each(|(&slot, x)| to[slot as usize] = x);
        }
        Ok(())
    }
}
