//! Which nodes of a graph run where, read back from what ONNX Runtime logs while it opens a session.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use ort::logging::LogLevel;
use ort::session::builder::SessionBuilder;

/// Operators that compute shapes: a few integers, which providers leave to the processor on purpose.
const OF_SHAPES: [&str; 9] = ["Shape", "Size", "Concat", "Unsqueeze", "Squeeze", "Gather", "Slice", "Range", "ConstantOfShape"];

/// Listens while a session is opened.
#[derive(Clone, Default)]
pub(super) struct Placement(Arc<Mutex<Lines>>);

/// Operators on the processor, and how often each.
#[derive(Default)]
struct Lines {
    on_processor: bool,
    operators: BTreeMap<String, usize>,
}

impl Placement {
    /// Placement is logged at the most verbose level only; what else comes there, some of it while graphs run, is dropped.
    pub fn listen(&self, builder: SessionBuilder) -> Result<SessionBuilder, ort::Error> {
        let listener = self.clone();
        let logger = Arc::new(move |_: LogLevel, _: &str, _: &str, _: &str, message: &str| listener.hear(message));
        Ok(builder.with_logger(logger)?.with_log_level(LogLevel::Verbose)?)
    }

    /// Operators that run on the processor though another provider was asked for, such as `MatMul (3), Softmax`; empty if none does.
    pub fn strangers(&self) -> String {
        let lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let strangers = lines.operators.iter().filter(|(operator, _)| !OF_SHAPES.contains(&operator.as_str()));
        let named: Vec<String> = strangers
            .map(|(operator, count)| if *count > 1 { format!("{operator} ({count})") } else { operator.clone() })
            .collect();
        named.join(", ")
    }

    /// A heading such as ` Node(s) placed on [CPUExecutionProvider]. Number of nodes: 2`, then a line such as `  MatMul (name)` a node.
    fn hear(&self, message: &str) {
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if message.contains(" placed on [") {
            lines.on_processor = message.contains("[CPUExecutionProvider]");
        } else if let Some((operator, _)) = message.strip_prefix("  ").and_then(|node| node.split_once(" ("))
            && lines.on_processor
        {
            *lines.operators.entry(operator.to_owned()).or_default() += 1;
        } else {
            lines.on_processor = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_on_the_processor_are_named() {
        let placement = Placement::default();
        let said = [
            "Node placements",
            " Node(s) placed on [CPUExecutionProvider]. Number of nodes: 4",
            "  MatMul (n_1)",
            "  Softmax (n_2)",
            "  MatMul (n_3)",
            "  Concat (n_4)",
            " Node(s) placed on [WebGpuExecutionProvider]. Number of nodes: 1",
            "  Gelu (n_5)",
            "Some nodes were not assigned to the preferred execution providers",
            "  Erf (of another message)",
        ];
        said.iter().for_each(|line| placement.hear(line));
        assert_eq!(placement.strangers(), "MatMul (2), Softmax");
        assert_eq!(Placement::default().strangers(), "");
    }
}
