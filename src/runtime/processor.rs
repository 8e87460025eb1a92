//! What the processor multiplies fast, as far as it decides which precision pays there.

use crate::bundle::{Bundle, GraphFacts, Precision};

/// A part of the instruction set that kernels of ONNX Runtime or of a plugin are written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Extension {
    Avx2,
    Avx512,
    AvxVnni,
    Avx512Vnni,
    Avx512Bf16,
    AmxBf16,
    AmxInt8,
    DotProd,
    I8mm,
    Bf16,
}

/// The extensions that a processor has and its operating system lets programs use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Processor {
    extensions: Vec<Extension>,
}

impl Processor {
    /// The one that this runs on.
    pub fn detect() -> Self {
        Self { extensions: detected() }
    }

    /// Whether it has this.
    pub fn has(&self, extension: Extension) -> bool {
        self.extensions.contains(&extension)
    }

    /// Whether plugins find instructions for bfloat16 here. ONNX Runtime's own kernels use none on x86-64.
    pub fn has_bfloat16(&self) -> bool {
        [Extension::Avx512Bf16, Extension::AmxBf16, Extension::Bf16].into_iter().any(|bf16| self.has(bf16))
    }

    /// Whether products of unsigned and signed 8-bit numbers are added in 16 bits, two at a time: too few for signed numbers beyond ±64.
    pub fn saturates(&self) -> bool {
        cfg!(target_arch = "x86_64") && ![Extension::AvxVnni, Extension::Avx512Vnni].into_iter().any(|vnni| self.has(vnni))
    }

    /// What was measured on processors of this kind, if anything was.
    pub fn gains(&self) -> &'static [Gain] {
        match self.extensions.as_slice() {
            has if has.contains(&Extension::AmxInt8) => &AMX,
            has if has.contains(&Extension::Avx512Vnni) => &AVX512_VNNI,
            [Extension::Avx2] => &AVX2,
            _ => &[],
        }
    }

    /// What of a bundle's graphs is slow here, a sentence each.
    pub fn notices(&self, bundle: &Bundle) -> Vec<String> {
        let mut found: Vec<(String, Vec<&str>)> = Vec::new();
        for (name, graph) in &bundle.facts().graphs {
            let Some(said) = self.slow(name, graph) else { continue };
            match found.iter_mut().find(|(reason, _)| *reason == said) {
                Some((_, graphs)) => graphs.push(name),
                None => found.push((said, vec![name])),
            }
        }
        found.into_iter().map(|(reason, graphs)| format!("{}: {reason}", graphs.join(", "))).collect()
    }

    /// Why a graph is slow here. A decoder lives by its steps, which have few rows.
    fn slow(&self, name: &str, graph: &GraphFacts) -> Option<String> {
        let precision = graph.computes_in();
        let gain = self.gains().iter().find(|gain| gain.precision == graph.precision && gain.weight_bits == graph.weight_bits);
        match graph.precision {
            Precision::Int8 if name != "decoder" && self.saturates() && graph.weight_bits == Some(8) => Some(format!(
                "{precision} is right on this processor ({self}) but runs in a slower way, for it has no VNNI; weights of 7 bits are faster here"
            )),
            Precision::Float16 | Precision::Bfloat16 if cfg!(target_arch = "x86_64") => {
                Some(format!("{precision} is computed as float32 on processors and gains nothing"))
            }
            _ if name != "decoder" => gain.filter(|gain| gain.many_rows < 1.0).map(|gain| {
                format!(
                    "{precision} has {:.1} times float32's speed on this processor ({self}); int8 is faster here",
                    gain.many_rows
                )
            }),
            _ => None,
        }
    }
}

/// How many times as fast as float32 a precision is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gain {
    /// The precision.
    pub precision: Precision,
    /// As in [`GraphFacts`].
    pub weight_bits: Option<u32>,
    /// Of many rows at once: the image encoder, a prefill.
    pub many_rows: f32,
    /// Of one row: a decode step.
    pub one_row: f32,
}

// `python -m blip2_export floor` measures such tables. AMX and AVX2 below are of one weight of 1024×4096 with 257 rows and with one, on two
// cores; AVX-512 is of ViT-L and of steps of a decoder of OPT-350m's size. Blocks are of 128, of 4 bits of 32. On AVX-512 int8 has one scale a
// tensor, which takes somewhat less time than one a row.
const AMX: [Gain; 2] = [gain(Precision::Int8, Some(8), 4.8, 4.1), gain(Precision::Int8Blocks, None, 1.2, 5.8)];
const AVX512_VNNI: [Gain; 3] = [
    gain(Precision::Int8, Some(8), 3.9, 2.6),
    gain(Precision::Int8Blocks, None, 2.1, 2.8),
    gain(Precision::Int4Blocks, None, 1.4, 3.2),
];
const AVX2: [Gain; 4] = [
    gain(Precision::Int8, Some(7), 1.6, 4.2),
    gain(Precision::Int8, Some(8), 1.3, 3.6),
    gain(Precision::Int8Blocks, None, 0.9, 4.7),
    gain(Precision::Int4Blocks, None, 1.2, 6.5),
];

const fn gain(precision: Precision, weight_bits: Option<u32>, many_rows: f32, one_row: f32) -> Gain {
    Gain { precision, weight_bits, many_rows, one_row }
}

/// Such as `int8, 7 bits: 1.6 times float32's speed for ViT and prefill, 4.2 for a decode step`.
impl std::fmt::Display for Gain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { precision, weight_bits, many_rows, one_row } = self;
        let bits = weight_bits.map_or(String::new(), |bits| format!(", {bits} bits"));
        write!(f, "{precision}{bits}: {many_rows} times float32's speed for ViT and prefill, {one_row} for a decode step")
    }
}

/// Extensions by their names, the widest last; `portable` where there is none.
impl std::fmt::Display for Processor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<&str> = self.extensions.iter().map(|extension| extension.name()).collect();
        f.write_str(&if names.is_empty() { "portable".into() } else { names.join(" ") })
    }
}

impl Extension {
    fn name(self) -> &'static str {
        match self {
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::AvxVnni => "avx-vnni",
            Self::Avx512Vnni => "avx512-vnni",
            Self::Avx512Bf16 => "avx512-bf16",
            Self::AmxBf16 => "amx-bf16",
            Self::AmxInt8 => "amx-int8",
            Self::DotProd => "dotprod",
            Self::I8mm => "i8mm",
            Self::Bf16 => "bf16",
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn detected() -> Vec<Extension> {
    use std::arch::is_x86_feature_detected as detected;
    let known = [
        (Extension::Avx2, detected!("avx2")),
        (Extension::Avx512, detected!("avx512f")),
        (Extension::AvxVnni, detected!("avxvnni")),
        (Extension::Avx512Vnni, detected!("avx512vnni")),
        (Extension::Avx512Bf16, detected!("avx512bf16")),
    ];
    let found: Vec<Extension> = known.into_iter().filter(|(_, there)| *there).map(|(extension, _)| extension).collect();
    // An emulator shows the flags of its host; whoever has tiles has VNNI.
    let tiles = if found.contains(&Extension::Avx512Vnni) {
        tiles(&std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default())
    } else {
        Vec::new()
    };
    found.into_iter().chain(tiles).collect()
}

/// The standard library asks for tiles in nightly builds only; Linux lists them where a program may use them.
#[cfg(target_arch = "x86_64")]
fn tiles(cpuinfo: &str) -> Vec<Extension> {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    let known = [(Extension::AmxBf16, "amx_bf16"), (Extension::AmxInt8, "amx_int8")];
    known.into_iter().filter(|(_, flag)| flags.split_whitespace().any(|word| word == *flag)).map(|(tile, _)| tile).collect()
}

#[cfg(target_arch = "aarch64")]
fn detected() -> Vec<Extension> {
    use std::arch::is_aarch64_feature_detected as detected;
    let known =
        [(Extension::DotProd, detected!("dotprod")), (Extension::I8mm, detected!("i8mm")), (Extension::Bf16, detected!("bf16"))];
    known.into_iter().filter(|(_, there)| *there).map(|(extension, _)| extension).collect()
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn detected() -> Vec<Extension> {
    Vec::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn graph(precision: Precision, weight_bits: Option<u32>) -> GraphFacts {
        let bundle = Bundle::open(&std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo-opt")).unwrap();
        GraphFacts { precision, weight_bits, ..bundle.graph("vision").clone() }
    }

    #[test]
    fn what_is_slow_is_told_of_the_processor_that_it_is_slow_on() {
        let avx2 = Processor { extensions: vec![Extension::Avx2] };
        let vnni = Processor { extensions: vec![Extension::Avx2, Extension::Avx512, Extension::Avx512Vnni] };
        let (wide, narrow) = (graph(Precision::Int8, Some(8)), graph(Precision::Int8, Some(7)));
        let blocks = graph(Precision::Int8Blocks, None);
        if cfg!(target_arch = "x86_64") {
            assert!(avx2.slow("vision", &wide).unwrap().contains("int8 is right on this processor (avx2)"));
        }
        assert_eq!((vnni.slow("vision", &wide), avx2.slow("vision", &narrow), avx2.slow("decoder", &wide)), (None, None, None));
        assert!(avx2.slow("vision", &blocks).unwrap().contains("0.9 times float32's speed"));
        assert_eq!((avx2.slow("decoder", &blocks), vnni.slow("vision", &blocks)), (None, None));
        assert_eq!(avx2.slow("vision", &graph(Precision::Float32, None)), None);
    }

    #[test]
    fn nothing_is_said_of_processors_that_were_not_measured() {
        for extensions in [vec![], vec![Extension::Avx2, Extension::AvxVnni], vec![Extension::DotProd]] {
            assert!(Processor { extensions }.gains().is_empty());
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn tiles_are_what_linux_lists() {
        let listed = "processor\t: 0\nflags\t\t: fpu amx_bf16 avx512f amx_tile amx_int8\n";
        assert_eq!(tiles(listed), [Extension::AmxBf16, Extension::AmxInt8]);
        assert!(tiles("flags : amx_tile\n").is_empty() && tiles("").is_empty());
    }
}
