package traffic

import (
	"context"
	"crypto/tls"
	"errors"
	"strconv"
	"sync"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	alfv3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	alsv3 "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

const (
	// leaseBatch and leaseFlush are how an Envoy batches its log (feedback: alsBatched).
	leaseBatch = 256
	leaseFlush = 20 * time.Millisecond
	// leaseBacklog is how many ends may wait to be sent; then answers wait too, so that none is lost.
	leaseBacklog  = 64 << 10
	leasePatience = 10 * time.Second
)

// A leaseEnder says that requests ended, as Envoy's access log does, over a connection of its own. It
// connects when there is a first lease: most runs have none.
type leaseEnder struct {
	address string
	tls     *tls.Config
	once    sync.Once
	ends    chan leaseEnd
	done    chan struct{}
	sent    int64
	err     error
}

type leaseEnd struct {
	id     string
	start  time.Time
	number uint64
}

func newLeaseEnder(c Config) *leaseEnder {
	return &leaseEnder{address: c.Address, tls: c.TLS, ends: make(chan leaseEnd, leaseBacklog), done: make(chan struct{})}
}

// add ends the lease of a call.
func (e *leaseEnder) add(id string, c *call) {
	e.once.Do(func() { go e.run() })
	e.ends <- leaseEnd{id, c.request, c.number}
}

// close sends what is left, and returns how many leases were ended.
func (e *leaseEnder) close() (ended int64, err error) {
	e.once.Do(func() { close(e.done) })
	close(e.ends)
	<-e.done
	return e.sent, e.err
}

func (e *leaseEnder) run() {
	defer close(e.done)
	e.err = e.serve()
	lost := false
	for range e.ends { // nobody waits for room
		lost = true
	}
	if e.err == nil && lost {
		e.err = errors.New("the server closed its access log")
	}
}

func (e *leaseEnder) serve() error {
	creds := insecure.NewCredentials()
	if e.tls != nil {
		creds = credentials.NewTLS(e.tls)
	}
	conn, err := grpc.NewClient(e.address, grpc.WithTransportCredentials(creds))
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	stream, err := alsv3.NewAccessLogServiceClient(conn).StreamAccessLogs(ctx, grpc.WaitForReady(true))
	if err != nil {
		return err
	}
	identifier := &alsv3.StreamAccessLogsMessage_Identifier{
		Node: &corev3.Node{Id: "keyward-bench", Cluster: "keyward-bench"}, LogName: "keyward-leases",
	}
	var batch []*alfv3.HTTPAccessLogEntry
	flush := func() error {
		if len(batch) == 0 {
			return nil
		}
		err := stream.Send(&alsv3.StreamAccessLogsMessage{Identifier: identifier,
			LogEntries: &alsv3.StreamAccessLogsMessage_HttpLogs{HttpLogs: &alsv3.StreamAccessLogsMessage_HTTPAccessLogEntries{LogEntry: batch}}})
		if err == nil {
			e.sent += int64(len(batch))
		}
		identifier, batch = nil, nil
		return err
	}
	tick := time.NewTicker(leaseFlush)
	defer tick.Stop()
	for {
		select {
		case end, more := <-e.ends:
			if !more {
				err := flush()
				if err != nil {
					return err
				}
				// The server answers the end of the stream when it has read all of it.
				stop := time.AfterFunc(leasePatience, cancel)
				defer stop.Stop()
				_, err = stream.CloseAndRecv()
				return err
			}
			batch = append(batch, entryOf(end))
			if len(batch) >= leaseBatch {
				if err := flush(); err != nil {
					return err
				}
			}
		case <-tick.C:
			if err := flush(); err != nil {
				return err
			}
		}
	}
}

// entryOf is Envoy's entry for a request that ended.
func entryOf(end leaseEnd) *alfv3.HTTPAccessLogEntry {
	return &alfv3.HTTPAccessLogEntry{
		CommonProperties: &alfv3.AccessLogCommon{
			DownstreamDirectRemoteAddress: &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
				Address: clientIP, PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: clientPort},
			}}},
			StartTime: timestamppb.New(end.start),
			Duration:  durationpb.New(time.Since(end.start)),
			StreamId:  strconv.FormatUint(end.number, 10),
			Metadata: &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{
				"envoy.filters.http.ext_authz": {Fields: map[string]*structpb.Value{leaseField: structpb.NewStringValue(end.id)}},
			}},
			AccessLogType: alfv3.AccessLogType_DownstreamEnd,
		},
	}
}
