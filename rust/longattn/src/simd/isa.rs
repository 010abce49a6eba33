//! Instruction sets that kernels exist for: which this CPU has, and which one is used.

use super::memory;
use super::tiles::Tiles;
use crate::tensor::{Error, Result};
use std::sync::atomic::{AtomicU8, Ordering};

/// An instruction set that kernels exist for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Isa {
    /// Portable code, on every machine.
    Scalar = 1,
    /// AArch64 Advanced SIMD.
    Neon,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AVX-512 with VNNI dot products.
    Avx512Vnni,
    /// AVX-512 with VNNI and BF16 dot products.
    Avx512Bf16,
    /// The same, with matrix registers that multiply bf16 and bytes.
    Amx,
}

impl Isa {
    const ALL: [Self; 7] =
        [Self::Scalar, Self::Neon, Self::Avx2, Self::Avx512, Self::Avx512Vnni, Self::Avx512Bf16, Self::Amx];

    /// Name, as `LONGATTN_ISA` spells it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Neon => "neon",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Vnni => "avx512vnni",
            Self::Avx512Bf16 => "avx512bf16",
            Self::Amx => "amx",
        }
    }

    /// Whether this CPU has it.
    pub fn is_available(self) -> bool {
        match self {
            Self::Scalar => true,
            #[cfg(target_arch = "aarch64")]
            Self::Neon => std::arch::is_aarch64_feature_detected!("neon"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                Self::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => Self::Avx512.is_available() && is_x86_feature_detected!("avx512vnni"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => Self::Avx512Vnni.is_available() && is_x86_feature_detected!("avx512bf16"),
            #[cfg(target_arch = "x86_64")]
            Self::Amx => Self::Avx512Bf16.is_available() && Tiles::detect().is_some(),
            #[allow(unreachable_patterns, reason = "the arms above depend on the architecture")]
            _ => false,
        }
    }

    /// Matrix registers, on the instruction set that has them.
    pub(crate) fn tiles(self) -> Option<Tiles> {
        if self == Self::Amx { Tiles::detect() } else { None }
    }

    /// Every instruction set of this CPU, the best last.
    pub fn available() -> Vec<Self> {
        Self::ALL.into_iter().filter(|isa| isa.is_available()).collect()
    }

    /// The instruction set of that name, if this CPU has it.
    pub fn from_name(name: &str) -> Result<Self> {
        Self::named(name, "isa")
    }

    /// The same of an `argument` that named it.
    fn named(name: &str, argument: &'static str) -> Result<Self> {
        let available = Self::available();
        available.iter().copied().find(|isa| isa.name() == name).ok_or_else(|| {
            let names: Vec<_> = available.iter().map(|isa| isa.name()).collect();
            Error::value(argument, format!("{name:?}"), format!("one that this CPU has: {}", names.join(", ")))
        })
    }
}

/// The environment variable that names an instruction set.
const VARIABLE: &str = "LONGATTN_ISA";

static CURRENT: AtomicU8 = AtomicU8::new(0);

/// The instruction set that kernels run on: the one set last, else `LONGATTN_ISA`, else the best of this CPU.
///
/// A `LONGATTN_ISA` that this CPU has not is ignored here and reported by [`check_environment`].
pub fn current() -> Isa {
    let code = CURRENT.load(Ordering::Relaxed);
    if let Some(isa) = Isa::ALL.into_iter().find(|&isa| isa as u8 == code) {
        return isa;
    }
    let asked = std::env::var(VARIABLE).ok().and_then(|name| Isa::from_name(name.trim()).ok());
    let isa = asked.unwrap_or_else(|| *Isa::available().last().expect("scalar is always there"));
    run_on(isa);
    isa
}

fn run_on(isa: Isa) {
    memory::choose_cache();
    CURRENT.store(isa as u8, Ordering::Relaxed);
}

/// An error when `LONGATTN_ISA` names something that this CPU has not.
pub fn check_environment() -> Result<()> {
    match std::env::var_os(VARIABLE) {
        Some(name) if !name.to_string_lossy().trim().is_empty() => {
            Isa::named(name.to_string_lossy().trim(), VARIABLE).map(drop)
        }
        _ => Ok(()),
    }
}

/// Forces an instruction set for the whole process.
pub fn set_current(isa: Isa) -> Result<()> {
    Isa::from_name(isa.name())?;
    run_on(isa);
    Ok(())
}

/// The features of this CPU that matter to kernels, by name.
pub fn cpu_features() -> Vec<(&'static str, bool)> {
    macro_rules! detect {
        ($macro:ident: $($name:tt)*) => { vec![$(($name, std::arch::$macro!($name))),*] };
    }
    #[cfg(target_arch = "x86_64")]
    {
        let mut features = detect!(is_x86_feature_detected: "avx2" "fma" "f16c" "avxvnni" "avx512f" "avx512bw" "avx512dq"
            "avx512vl" "avx512vnni" "avx512vbmi" "avx512vpopcntdq" "avx512bf16" "avx512fp16");
        features.push(("amx", Tiles::detect().is_some()));
        features
    }
    #[cfg(target_arch = "aarch64")]
    return detect!(is_aarch64_feature_detected: "neon" "dotprod" "fp16" "bf16" "i8mm" "sve");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    vec![]
}
