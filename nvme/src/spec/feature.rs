//! Features and asynchronous events: Base sections 5.27.1 and 5.2.

open_enum! {
    /// Feature identifiers: Base figure 317.
    FeatureId: u8 {
        /// Arbitration burst and weights.
        ARBITRATION = 0x01 "arbitration",
        /// Power management.
        POWER_MANAGEMENT = 0x02 "power management",
        /// Temperature threshold.
        TEMPERATURE_THRESHOLD = 0x04 "temperature threshold",
        /// Error recovery (NVM section 4.1.3).
        ERROR_RECOVERY = 0x05 "error recovery",
        /// Volatile write cache.
        VOLATILE_WRITE_CACHE = 0x06 "volatile write cache",
        /// Number of queues.
        NUMBER_OF_QUEUES = 0x07 "number of queues",
        /// Interrupt coalescing.
        INTERRUPT_COALESCING = 0x08 "interrupt coalescing",
        /// Interrupt vector configuration.
        INTERRUPT_VECTOR = 0x09 "interrupt vector configuration",
        /// Write atomicity (NVM section 4.1.3).
        WRITE_ATOMICITY = 0x0a "write atomicity",
        /// Asynchronous event configuration.
        ASYNC_EVENT_CONFIG = 0x0b "async event configuration",
        /// Keep alive timer.
        KEEP_ALIVE = 0x0f "keep alive timer",
        /// Host behavior support.
        HOST_BEHAVIOR = 0x16 "host behavior support",
    }
}

open_enum! {
    /// Asynchronous event type: Base figure 145.
    AsyncEventType: u8 {
        /// Error; the event information says which.
        ERROR = 0 "error",
        /// SMART / health.
        HEALTH = 1 "health",
        /// Notice, such as changed namespaces.
        NOTICE = 2 "notice",
        /// Immediate.
        IMMEDIATE = 3 "immediate",
        /// Event of an I/O command set.
        COMMAND_SET = 6 "command set",
        /// Vendor specific event.
        VENDOR = 7 "vendor",
    }
}

/// Dword 0 of an asynchronous event request's completion: Base figure 145.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct AsyncEvent(pub u32);

impl AsyncEvent {
    /// Makes an event of a type with its information; reading the page `log` clears it.
    pub fn new(kind: AsyncEventType, info: u8, log: u8) -> AsyncEvent {
        AsyncEvent(u32::from(kind.0 & 7) | u32::from(info) << 8 | u32::from(log) << 16)
    }

    /// Type.
    pub fn kind(self) -> AsyncEventType {
        AsyncEventType((self.0 & 7) as u8)
    }

    /// The event's number within its type (asynchronous event information).
    pub fn info(self) -> u8 {
        (self.0 >> 8 & 0xff) as u8
    }

    /// The log page that describes the event. Reading it re-arms the event.
    pub fn log_page(self) -> u8 {
        (self.0 >> 16 & 0xff) as u8
    }

    /// A description of the event (Base figures 146 to 151).
    pub fn text(self) -> &'static str {
        match (self.kind().0, self.info()) {
            (0, 0) => "write to an invalid doorbell register",
            (0, 1) => "invalid doorbell value",
            (0, 2) => "diagnostic failure",
            (0, 3) => "persistent internal error",
            (0, 4) => "transient internal error",
            (0, 5) => "firmware image load error",
            (1, 0) => "subsystem reliability degraded",
            (1, 1) => "temperature threshold crossed",
            (1, 2) => "spare below threshold",
            (2, 0) => "namespaces changed",
            (2, 1) => "firmware activation starting",
            (2, 2) => "telemetry log changed",
            (2, 3) => "asymmetric namespace access changed",
            _ => "unknown event",
        }
    }
}

impl std::fmt::Debug for AsyncEvent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

impl std::fmt::Display for AsyncEvent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} event {:#x}: {} (log page {:#x})",
            self.kind(),
            self.info(),
            self.text(),
            self.log_page()
        )
    }
}
