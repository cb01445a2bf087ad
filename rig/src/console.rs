//! What the guest says on its serial line, and what that means.

/// Result of one step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It passed.
    Ok,
    /// It failed, and how.
    Failed(String),
    /// It could not be run, and why.
    Skipped(String),
}

/// One line from the guest, understood.
#[derive(Debug, PartialEq, Eq)]
pub enum Line<'a> {
    /// A step begins.
    Step(&'a str),
    /// A step ended.
    Test(&'a str, Verdict),
    /// Something that the host is asked to do.
    Host(&'a str),
    /// A kernel message that fails the run.
    Kernel(&'a str),
    /// Exit code of all steps.
    Exit(i32),
    /// For the log only.
    Text,
}

/// Reads one line; what is not of the protocol is [`Line::Text`].
pub fn parse(line: &str) -> Line<'_> {
    // The kernel may have left its own, unfinished text in front.
    let Some(at) = line.find("RIG-") else {
        return Line::Text;
    };
    let (word, rest) = line[at..].split_once(' ').unwrap_or((&line[at..], ""));
    let rest = rest.trim();
    match word {
        "RIG-STEP" => Line::Step(rest),
        "RIG-HOST" => Line::Host(rest),
        "RIG-KERNEL" => Line::Kernel(rest),
        "RIG-EXIT" => rest.parse().map_or(Line::Text, Line::Exit),
        "RIG-TEST" => test(rest).unwrap_or(Line::Text),
        _ => Line::Text,
    }
}

fn test(rest: &str) -> Option<Line<'_>> {
    let (word, rest) = rest.split_once(' ')?;
    let (name, why) = rest.split_once(": ").unwrap_or((rest, ""));
    let verdict = match word {
        "ok" => Verdict::Ok,
        "fail" => Verdict::Failed(why.to_owned()),
        "skip" => Verdict::Skipped(why.to_owned()),
        _ => return None,
    };
    Some(Line::Test(name, verdict))
}

/// Whether a line of QEMU's own error output tells of a DMA transfer that the IOMMU refused.
/// QEMU's NVMe controller completes such a command with success, so nothing else would show it.
pub fn is_dma_fault(stderr_line: &str) -> bool {
    let told_by_iommu = ["vtd_", "amdvi_"].iter().any(|p| stderr_line.contains(p));
    // A guest that reads the queue of the IOMMU while it is being disabled is not a DMA fault.
    told_by_iommu && !stderr_line.contains("_init")
}

#[cfg(test)]
mod tests {
    use super::{Line, Verdict, is_dma_fault, parse};

    #[test]
    fn protocol() {
        assert_eq!(parse("RIG-EXIT 3"), Line::Exit(3));
        assert_eq!(parse("[    1.0] noiseRIG-EXIT 0"), Line::Exit(0));
        assert_eq!(parse("RIG-EXIT x"), Line::Text);
        assert_eq!(parse("RIG-STEP a b"), Line::Step("a b"));
        assert_eq!(parse("RIG-TEST ok io"), Line::Test("io", Verdict::Ok));
        assert_eq!(
            parse("RIG-TEST fail io: exit code 1"),
            Line::Test("io", Verdict::Failed("exit code 1".into()))
        );
        assert_eq!(
            parse("RIG-TEST skip cmb: none here"),
            Line::Test("cmb", Verdict::Skipped("none here".into()))
        );
        assert_eq!(parse("RIG-HOST device_del n1"), Line::Host("device_del n1"));
        assert_eq!(parse("hello"), Line::Text);
    }

    #[test]
    fn faults() {
        assert!(is_dma_fault(
            "qemu-system-x86_64: vtd_iommu_translate: detected translation failure"
        ));
        assert!(!is_dma_fault("qemu-system-x86_64: warning: something else"));
    }
}
